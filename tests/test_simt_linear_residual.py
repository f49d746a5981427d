"""Linear layers that add to a residual stream, on the harness: the kernels for Hopper and those for
every GPU, the same bits in every schedule, right ones, bytes moved.
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
from fused_lm.reference import linear_residual as reference
from fused_lm.tolerance import check_close
from tests.golden import compiled_kernels
from tests.linear_act_runs import in_schedules, parameters
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
MUTANT_SCHEDULES = 6
BLOCK_M, BLOCK_N = 128, 192
"""Of Hopper's tile, csrc/kernels/gemm_tuning_sm90.h."""
P = 0.3


@dataclass(frozen=True)
class Call:
    """x [N, C], F outputs; ``why`` is what it is there for."""

    why: str
    N: int = 40
    C: int = 72
    F: int = 48
    dtype: torch.dtype = BF16
    stream: torch.dtype | None = None
    drops: bool = True
    bias: bool = True
    transposed: bool = False
    sms: int = 2

    @property
    def forward(self) -> tuple[Any, ...]:
        make = torch.Generator().manual_seed(sum(map(ord, self.why)))

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        shape = (self.C, self.F) if self.transposed else (self.F, self.C)
        return (
            drawn(self.N, self.C).to(self.dtype),
            (drawn(*shape) * self.C**-0.5).to(self.dtype),
            drawn(self.F).to(self.dtype) if self.bias else None,
            drawn(self.N, self.F).to(self.stream or self.dtype),
            torch.tensor([7, 11, 0, 3]) if self.drops else None,
            P if self.drops else 0.0,
            self.transposed,
        )

    @property
    def backward(self) -> tuple[Any, ...]:
        x, weight, bias, residual, rng, dropout_p, transposed = self.forward
        return residual, x, weight, bias, rng, dropout_p, transposed, True, self.bias, True


SEVERAL = [
    Call(f"several tiles, {name}{turned}", 300, 200, 264, dtype, transposed=transposed)
    for name, dtype in (("bf16", BF16), ("fp16", F16))
    for turned, transposed in (("", False), (", turned weight", True))
]
SHARED = [
    Call(f"shared, {name}", 40, 1000, 72, dtype, sms=8)
    for name, dtype in (("bf16", BF16), ("fp16", F16))
]
CALLS = [
    *SEVERAL,
    *SHARED,
    Call("an fp32 stream", stream=F32),
    Call("an fp32 stream, fp16", stream=F32, dtype=F16),
    Call("no dropout", drops=False),
    Call("no dropout, an fp32 stream, no bias", drops=False, stream=F32, bias=False),
    Call("one row", 1, 64, 64),
    Call("eight of everything", 8, 8, 8),
]
FEW = [call for call in CALLS if call.N <= 40]


def check_forward(call: Call, y: Tensor) -> None:
    same = reference.linear_residual_forward(*call.forward)
    check_close(y, same, reference.linear_residual_forward(*_in_fp64(call.forward)), "y")


def check_backward(call: Call, found: Sequence[Tensor]) -> None:
    """dx, dweight and dbias."""
    same = reference.linear_residual_backward(*call.backward)
    exact = reference.linear_residual_backward(*_in_fp64(call.backward))
    for name, *each in zip(("dx", "dweight", "dbias"), found, same, exact, strict=True):
        check_close(*each, name)


def _run(hopper: bool, op: str, harness: runtime.Harness, call: Call) -> Sequence[Tensor]:
    arguments = call.forward if op.endswith("fwd") else call.backward
    with harness.choosing(hopper=hopper, multiprocessors=call.sms):
        found = harness.call(op, *arguments)
    return [found] if isinstance(found, Tensor) else list(found)


def _in_fp64(arguments: tuple[Any, ...]) -> list[Any]:
    """All but what names dropout's mask."""
    floats = [isinstance(a, Tensor) and a.is_floating_point() for a in arguments]
    return [a.double() if wide else a for a, wide in zip(arguments, floats, strict=True)]


kinds = pytest.mark.parametrize("hopper", [True, False], ids=["Hopper", "every GPU"])


@kinds
@pytest.mark.parametrize("call", parameters(CALLS, FEW))
def test_forward(call: Call, hopper: bool, harness: runtime.Harness) -> None:
    (y,) = in_schedules(harness, partial(_run, hopper, "linear_residual_fwd"), call)
    check_forward(call, y)


@pytest.mark.parametrize("call", parameters(CALLS, FEW))
def test_backward(call: Call, harness: runtime.Harness) -> None:
    """Its products are those of every linear layer."""
    found = in_schedules(harness, partial(_run, True, "linear_residual_bwd"), call)
    check_backward(call, found)


@needs_race
@pytest.mark.parametrize("call", [SEVERAL[0], CALLS[6]], ids=lambda call: call.why)
def test_moves_the_stream_once(call: Call) -> None:
    """In and out, whatever dtype it has."""
    harness = runtime.load("race")
    with harness.counting(hopper=True, multiprocessors=call.sms) as counts:
        harness.call("linear_residual_fwd", *call.forward)
    plan = harness.module.gemm_plan_sm90(call.N, call.F, call.C, "residual", call.sms)
    assert plan["block_n"] == BLOCK_N and plan["whole"] > 0
    clusters, tiles_n = -(-call.N // (2 * BLOCK_M)), -(-call.F // BLOCK_N)
    operands = 2 * (call.N * call.C * tiles_n + call.F * call.C * clusters)
    threads = 128 * 2 * clusters
    stream = call.N * call.F * (4 if call.stream == F32 else 2)
    rng = 32 * threads * tiles_n * call.drops
    assert counts["global_read_bytes"] == operands + threads * call.F // 8 * 4 + stream + rng
    assert counts["global_write_bytes"] == stream


@pytest.mark.slow
@needs_race
@kinds
def test_no_mutant_survives(hopper: bool) -> None:
    """Every synchronisation of the forward, dropped in turn, but the wait for results that TMA
    stores: here it stores none.
    """
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    call = Call("several tiles a block", 900, 200, 264)
    hunt.drop_each(call.why, partial(_run, hopper, "linear_residual_fwd", hunt.harness, call))
    problems = [p for p in hunt.problems(set()) if "bulk_wait_read" not in p]
    assert hunt.killed and not problems, "\n".join(problems)


@pytest.mark.slow
@kinds
def test_every_instantiation_runs(hopper: bool) -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = {
        name
        for name in compiled_kernels("gemm_sm90" if hopper else "gemm_sm80")
        if "Residual" in name
    }
    harness = runtime.load(runtime.ONE)
    for call in [*SEVERAL, *SHARED]:
        _run(hopper, "linear_residual_fwd", harness, call)
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert compiled and not compiled - ran, f"no call reaches {sorted(compiled - ran)}"
