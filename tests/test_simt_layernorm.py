"""The CUDA norms on the harness, beyond what ``test_layernorm.py`` asks of every backend: widths of
every kernel, all schedules, bytes moved, bank conflicts, and every synchronisation dropped in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import layernorm as reference
from fused_lm.tolerance import check_close
from tests.golden import compiled_kernels
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5
MUTANT_SCHEDULES = 4
LARGE = 20_000
"""Elements, from which on a call runs in fewer schedules."""
SMS = 2
"""Of tests/simt/host/device.cpp."""


@dataclass(frozen=True)
class Call:
    """One norm; ``why`` is what it is there for."""

    why: str
    N: int
    C: int
    x: torch.dtype = BF16
    stream: torch.dtype | None = None
    y: torch.dtype | None = None
    parameters: torch.dtype = BF16
    residual: bool = False
    dropout_p: float = 0.0
    rms: bool = False
    shift: int = 0

    @property
    def stream_dtype(self) -> torch.dtype:
        return self.stream or self.x

    @property
    def y_dtype(self) -> torch.dtype:
        return self.y or self.x

    @property
    def width(self) -> int:
        """Elements per vector, as the kernels choose it."""
        if self.shift or self.C % 4:
            return 1
        types = {self.x, self.stream_dtype if self.has_stream else self.x, self.y_dtype}
        return 8 if len(types) == 1 and self.x.itemsize == 2 and self.C % 8 == 0 else 4

    @property
    def has_stream(self) -> bool:
        return self.residual or self.dropout_p > 0


CALLS = [
    Call("GPT-2's width", 37, 768),
    Call("narrow rows: several a warp", 70, 64, F16, parameters=F16),
    Call("narrow rows, bf16 beside fp32 parameters", 41, 96, parameters=F32),
    Call("8 columns: one vector a row", 19, 8),
    Call("one row", 1, 1024, F32, parameters=F32),
    Call("narrow, fp32", 9, 100, F32, parameters=F32, residual=True),
    Call("odd width: no vectors", 11, 769, residual=True),
    Call("width 1", 5, 1, F32, parameters=F32),
    Call("rows that start off a vector", 6, 256, shift=1),
    Call("odd, wider than a backward's registers", 3, 1801, F16),
    Call("autocast: bf16 beside an fp32 stream", 9, 1600, BF16, F32, BF16, F32, True, 0.1),
    Call("autocast, narrow", 21, 128, BF16, F32, BF16, F32, True),
    Call("autocast, wide", 4, 4400, BF16, F32, BF16, F32, True),
    Call("autocast in fp16", 5, 1024, F16, F32, F16, F32, True),
    Call("autocast in fp16, narrow", 5, 64, F16, F32, F16, F32, True),
    Call("autocast in fp16, wide", 3, 4096, F16, F32, F16, F32, True, 0.1),
    Call("fp16 in, fp32 out", 7, 512, F16, y=F32, parameters=F32),
    Call("fp16 in, fp32 out, narrow", 7, 32, F16, y=F32, parameters=F32),
    Call("fp16 in, fp32 out, wide", 3, 3000, F16, y=F32, parameters=F32),
    Call("bf16 in, fp32 out", 6, 1280, BF16, y=F32),
    Call("bf16 in, fp32 out, narrow", 6, 200, BF16, y=F32),
    Call("bf16 in, fp32 out, wide", 3, 3072, BF16, y=F32),
    Call("dtypes that no row of the table has", 5, 320, F32, F16, BF16, F16, True, 0.3),
    Call("any dtypes, narrow", 5, 40, F32, F16, BF16, F16, True),
    Call("any dtypes, wide", 3, 4000, F32, BF16, F16, F16, True),
    Call("RMSNorm with residual", 13, 2048, residual=True, rms=True),
    Call("several warps a row", 3, 4096, residual=True, dropout_p=0.2),
    Call("fp16, several warps a row", 3, 5120, F16, parameters=F16),
    Call("fp32, several warps a row", 5, 4608, F32, parameters=F32),
    Call("widest row in the forward's registers", 3, 16384),
    Call("wider than registers", 3, 24000, residual=True),
    Call("looped, more rows than one strip takes", 37, 8200, residual=True),
    Call("looped, autocast with dropout", 6, 16500, BF16, F32, BF16, F32, True, 0.2),
    Call("looped, fp32", 5, 16500, F32, parameters=F32),
    Call("wider than registers, odd, RMSNorm", 2, 20001, F16, parameters=F32, rms=True),
]


@dataclass
class Data:
    """Inputs of a forward and of a backward on its results, the same for every schedule."""

    call: Call
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    rng: Tensor | None
    dy: Tensor
    dstream: Tensor | None

    def forward(self) -> tuple[Any, ...]:
        c = self.call
        bias = () if c.rms else (self.bias,)
        tail = (self.rng, EPS, c.dropout_p, c.y_dtype, c.stream_dtype)
        return (self.x, self.residual, self.weight, *bias, *tail)

    def backward(self, stream: Tensor, *statistics: Tensor) -> tuple[Any, ...]:
        c = self.call
        bias = () if c.rms else (self.bias,)
        saved = (stream if stream.dim() == 2 else self.x, self.weight, *bias, *statistics)
        residual_dtype = None if self.residual is None else self.residual.dtype
        return (self.dy, self.dstream, *saved, self.rng, c.dropout_p, c.x, residual_dtype)


def data_of(call: Call) -> Data:
    def rows(dtype: torch.dtype) -> Tensor:
        wide = torch.randn(call.N, call.C + call.shift).to(dtype)
        return wide[:, call.shift :]

    return Data(
        call,
        rows(call.x),
        rows(call.stream_dtype) if call.residual else None,
        torch.randn(call.C).to(call.parameters),
        None if call.rms else torch.randn(call.C).to(call.parameters),
        torch.tensor([12345678901, 3, 0, 0]) if call.dropout_p > 0 else None,
        rows(call.y_dtype),
        rows(call.stream_dtype) if call.has_stream else None,
    )


def run(harness: Any, data: Data) -> list[Tensor]:
    """Outputs of the forward, then of the backward; ``harness`` may be a GPU, :mod:`tests.gpu`."""
    op = "rms_norm" if data.call.rms else "layer_norm"
    outputs = harness.call(f"{op}_fwd", *data.forward())
    return [*outputs, *harness.call(f"{op}_bwd", *data.backward(*outputs[1:]))]


def _exact(data: Data) -> list[Tensor]:
    """The same in fp64, but with the stream rounded as it is stored."""
    wide = Data(
        data.call,
        *(None if t is None else t.double() for t in (data.x, data.residual)),  # type: ignore
        data.weight.double(),
        None if data.bias is None else data.bias.double(),
        data.rng,
        data.dy.double(),
        None if data.dstream is None else data.dstream.double(),
    )
    op = "rms_norm" if data.call.rms else "layer_norm"
    forward, backward = (getattr(reference, f"{op}_{way}") for way in ("forward", "backward"))
    outputs = forward(*wide.forward()[:-2], F64, F64)
    given = list(wide.backward(*outputs[1:]))
    given[-2], given[-1] = F64, None if data.residual is None else F64
    return [*outputs, *backward(*given)]


def check(data: Data, results: Sequence[Tensor]) -> None:
    """Holds what :func:`run` gives against fp64."""
    own = _reference_in_own_dtypes(data)
    for ours, same, exact in zip(results, own, _exact(data), strict=True):
        if ours.numel() == 0 or exact.numel() == 0:
            assert ours.numel() == same.numel() == 0 or exact.numel() == 0
            continue
        check_close(ours, same, exact)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    _check_schedules(harness, call, (11,) if call.N * call.C > LARGE else (11, 0))


@pytest.mark.slow
@pytest.mark.skipif(runtime.sanitized(), reason="they look at addresses, in any schedule")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_more_schedules_give_the_same_bits(call: Call, harness: runtime.Harness) -> None:
    _check_schedules(harness, call, (11, 0, 1, 6) if call.N * call.C > LARGE else range(8))


def _check_schedules(harness: runtime.Harness, call: Call, seeds: Sequence[int]) -> None:
    data = data_of(call)
    results = []
    for seed in seeds:
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(run(harness, data))
    for i, other in enumerate(results[1:], 1):
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b), f"schedules 0 and {i} of this test differ"
    check(data, results[0])


def _reference_in_own_dtypes(data: Data) -> list[Tensor]:
    op = "rms_norm" if data.call.rms else "layer_norm"
    forward, backward = (getattr(reference, f"{op}_{way}") for way in ("forward", "backward"))
    outputs = forward(*data.forward())
    return [*outputs, *backward(*data.backward(*outputs[1:]))]


@pytest.mark.slow
@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from every call that passes it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in CALLS:
        data = data_of(call)
        forward, backward = _runs(hunt.harness, data)
        hunt.drop_each(f"forward, {call.why}", forward)
        hunt.drop_each(f"backward, {call.why}", backward)
    problems = hunt.problems(mutants.sources_of("layernorm*"))
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


def _runs(harness: runtime.Harness, data: Data) -> tuple[mutants.Run, mutants.Run]:
    """A forward, and a backward on the results of one."""
    op = "rms_norm" if data.call.rms else "layer_norm"
    forward = partial(harness.call, f"{op}_fwd", *data.forward())
    harness.configure()
    return forward, partial(harness.call, f"{op}_bwd", *data.backward(*forward()[1:]))


def _size(t: Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.element_size()


def _forward_bytes(data: Data, tuning: dict[str, int], outputs: list[Tensor]) -> tuple[int, int]:
    """Read and written, by the formulas at the top of ``layernorm_fwd.cu``."""
    c, (N, C) = data.call, data.x.shape
    stream = outputs[1]
    parameters = _size(data.weight) + _size(data.bias)
    reads = N * C * (_size(data.x) + _size(data.residual))
    if tuning["looped"]:
        again = _size(stream) or _size(data.x)
        reads += N * C * ((1 if c.rms else 2) * again + parameters)
    else:
        row_groups = -(-N // tuning["rows_per_block"]) * tuning["groups"]
        reads += row_groups * C * parameters
    writes = N * C * (_size(outputs[0]) + _size(stream)) + N * (4 if c.rms else 8)
    return reads, writes


def _backward_bytes(data: Data, tuning: dict[str, int], stream: Tensor) -> tuple[int, int]:
    """Read and written, by the formulas at the top of ``layernorm_bwd.cu``."""
    c, (N, C) = data.call, data.x.shape
    wanted = 1 if c.rms else 2
    statistics = N * (4 if c.rms else 8)
    strips = min(-(-N // tuning["rows_per_block"]), SMS * tuning["blocks_per_sm"])
    separate = data.residual is not None and data.residual.dtype != c.x
    writes = N * C * (_size(data.x) + (_size(data.residual) if separate else 0))
    parameter = 2 * _size(data.weight) if not c.rms else _size(data.weight)
    if tuning["looped"]:
        turns = -(-N // 4)
        reads = N * C * (2 * _size(data.dy) + 2 * _size(stream) + _size(data.dstream))
        reads += 2 * turns * C * _size(data.weight) + 4 * wanted * (turns - strips) * C
        writes += 4 * wanted * turns * C
    else:
        reads = N * C * (_size(data.dy) + _size(stream) + _size(data.dstream) + _size(data.weight))
        writes += 4 * wanted * strips * C
    reads += statistics * tuning["threads_per_row"]
    finalize = 4 * wanted * strips * C
    return reads + finalize, writes + C * parameter


@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.dropout_p == 0], ids=lambda call: call.why
)
def test_moves_exactly_its_floor(call: Call) -> None:
    """Every tensor once, whole sectors where rows fill them, no bank conflict."""
    harness = runtime.load("race")
    data = data_of(call)
    op = "rms_norm" if call.rms else "layer_norm"
    with harness.counting() as forward:
        outputs = harness.call(f"{op}_fwd", *data.forward())
    stream = outputs[1] if outputs[1].numel() else data.x
    with harness.counting() as backward:
        harness.call(f"{op}_bwd", *data.backward(*outputs[1:]))
    tuning = harness.module.norm_tuning(call.C, call.width, True)
    assert (forward["global_read_bytes"], forward["global_write_bytes"]) == _forward_bytes(
        data, tuning, outputs
    )
    tuning = harness.module.norm_tuning(call.C, call.width, False)
    assert (backward["global_read_bytes"], backward["global_write_bytes"]) == _backward_bytes(
        data, tuning, stream
    )
    for counts in (forward, backward):
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]
    if _rows_are_whole_sectors(call):
        assert forward["global_sectors"] == forward["global_ideal_sectors"]
        halves = _half_sectors(call, tuning)
        assert backward["global_sectors"] == backward["global_ideal_sectors"] + halves


def _rows_are_whole_sectors(call: Call) -> bool:
    """Whether no operand's rows share a sector, and none crosses in pieces of less than its lane's
    vector: fp32 parameters beside vectors of 8 do.
    """
    types = (call.x, call.stream_dtype, call.y_dtype, call.parameters)
    whole = all(call.C * dtype.itemsize % 32 == 0 for dtype in types)
    return whole and call.shift == 0 and not (call.width == 8 and call.parameters.itemsize == 4)


def _half_sectors(call: Call, tuning: dict[str, int]) -> int:
    """Sectors of which the backward moves one half after the other: a lane's 8 partial sums are 32
    bytes, 16 an instruction. The L2 joins them.
    """
    if call.width < 8 or tuning["looped"]:  # loops hold four columns
        return 0
    strips = min(-(-call.N // tuning["rows_per_block"]), SMS * tuning["blocks_per_sm"])
    return (1 if call.rms else 2) * strips * call.C // 8


@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
@pytest.mark.parametrize("C", [768, 1024, 4096, 16384])
def test_whole_sectors(C: int) -> None:
    """bf16 rows as a GPT has them: 2NC + parameters in, 2NC + 8N out, nothing fetched beside."""
    harness = runtime.load("race")
    data = data_of(Call("a GPT's rows", 16, C))
    with harness.counting() as counts:
        harness.call("layer_norm_fwd", *data.forward())
    tuning = harness.module.norm_tuning(C, 8, True)
    row_groups = 16 // tuning["rows_per_block"] * tuning["groups"]
    assert counts["global_read_bytes"] == 2 * 16 * C + row_groups * 4 * C
    assert counts["global_write_bytes"] == 2 * 16 * C + 8 * 16
    # A warp whose lanes write mean and rstd of a row each fill no sector.
    assert counts["global_sectors"] == counts["global_ideal_sectors"]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("layernorm_")
    harness = runtime.load(runtime.ONE)
    harness.configure()
    for call in CALLS:
        run(harness, data_of(call))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of CALLS reaches {sorted(compiled - ran)}"
