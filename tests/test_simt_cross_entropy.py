"""The CUDA cross entropy on the harness, beyond what ``test_cross_entropy.py`` asks of every
backend: rows of every length and alignment, all schedules, bytes moved, bank conflicts, and every
synchronisation dropped in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import cross_entropy as reference
from fused_lm.tolerance import check_close
from tests.golden import compiled_kernels
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
IGNORED = 3
MUTANT_SCHEDULES = 4
VECTOR = runtime.VECTOR_BYTES
LONG = 50_000
"""Classes from which a row takes a quarter of a second."""
SMOOTHED = {"label_smoothing": 0.1}
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


@dataclass(frozen=True)
class Call:
    """One call; ``why`` is what it is there for.

    Logits are columns ``shift`` to ``shift + V`` of rows that are ``gap`` columns longer.
    """

    why: str
    N: int
    V: int
    dtype: torch.dtype = BF16
    options: dict[str, float] = field(default_factory=dict)
    reduction: str = "mean"
    target: torch.dtype = torch.int64
    shift: int = 0
    gap: int = 0
    shared_bytes: int = runtime.LARGE_SHARED


CALLS = [
    Call("one class: loss 0", 5, 1, F32, reduction="sum"),
    Call("fewer classes than a vector has", 6, 7, reduction="none"),
    Call("one vector a row, softcap", 7, 8, BF16, ALL_OPTIONS),
    Call("bytes: a warp has a row", 9, 256, target=torch.uint8),
    Call("a warp, rows of three alignments", 9, 1003, F16, SMOOTHED, target=torch.int16),
    Call("128 threads, several alignments", 6, 4093, F16, ALL_OPTIONS, "sum", torch.int32),
    Call("128 threads, fp32", 5, 2001, F32, ALL_OPTIONS, target=torch.int8),
    Call("256 threads, two batches", 3, 8190, F32),
    Call("512 threads", 3, 16411, BF16, SMOOTHED, "none"),
    Call("rows that start off a vector", 5, 300, shift=3, reduction="none"),
    Call("a slice of wider rows: gradients begin elsewhere", 6, 509, BF16, ALL_OPTIONS, gap=3),
    Call("the same in fp16", 5, 1201, F16, gap=8, shift=1),
    Call("the same in fp32", 5, 301, F32, ALL_OPTIONS, gap=2),
    Call("the same, longer than shared memory", 2, 3001, BF16, gap=1, shared_bytes=4096),
    Call("longer than shared memory", 2, 7001, F16, ALL_OPTIONS, shared_bytes=4096),
    Call("longer than shared memory, fp32", 2, 3333, F32, SMOOTHED, shared_bytes=4096),
    Call("one row", 1, 96, F32),
    Call("GPT-2's vocabulary, two rows at a time", 2, 50257),
    Call("GPT-2's on a GeForce, where a row doesn't fit", 2, 50257, shared_bytes=99 << 10),
    Call("Llama 3's, half a row more than fits", 1, 128256),
    Call("Qwen's", 1, 151936, F16),
    Call("Gemma's, twice what fits", 1, 262144, BF16, ALL_OPTIONS),
]
SHORT = [call for call in CALLS if call.V < LONG]


@dataclass
class Data:
    """Inputs of a forward and a backward, the same for every schedule."""

    call: Call
    logits: Tensor
    target: Tensor
    dloss: Tensor

    @property
    def options(self) -> tuple[Any, ...]:
        given = self.call.options
        numbers = (given.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap"))
        return (IGNORED, *numbers, self.call.reduction)

    def forward(self, gradient: str = "with the loss") -> tuple[Any, ...]:
        return (self.logits, self.target, *self.options, gradient)

    def backward(self) -> tuple[Any, ...]:
        return (self.dloss, self.logits, self.target, *self.options)

    @property
    def counted(self) -> Tensor:
        return self.target.long() != IGNORED


def data_of(call: Call) -> Data:
    wide = (torch.randn(call.N, call.V + call.shift + call.gap) * 3).to(call.dtype)
    target = torch.randint(call.V, (call.N,)).clamp(max=torch.iinfo(call.target).max)
    if call.N > 2:
        target[1] = IGNORED
    dloss = torch.randn(call.N if call.reduction == "none" else ())
    logits = wide[:, call.shift : call.shift + call.V]
    return Data(call, logits, target.to(call.target), dloss)


def run(harness: Any, data: Data) -> list[Tensor]:
    """Loss and gradient of a forward, then a backward; ``harness`` may be :mod:`tests.gpu`."""
    loss, dlogits = harness.call("cross_entropy_fwd", *data.forward())
    return [loss, dlogits, harness.call("cross_entropy_bwd", *data.backward())]


def check(data: Data, results: Sequence[Tensor]) -> None:
    """Holds what :func:`run` gives against fp64."""
    wide = Data(data.call, data.logits.double(), data.target, data.dloss.double())
    same, exact = (
        [
            *reference.cross_entropy_forward(*d.forward()),
            reference.cross_entropy_backward(*d.backward()),
        ]
        for d in (data, wide)
    )
    for i, name in enumerate(("loss", "dlogits", "dlogits of dloss")):
        check_close(results[i], same[i], exact[i], name)


@pytest.mark.parametrize("call", SHORT, ids=lambda call: call.why)
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    _check_schedules(call, harness, (0, 11))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_more_schedules_and_large_vocabularies(call: Call, harness: runtime.Harness) -> None:
    seeds = range(3) if call.V >= LONG or runtime.sanitized() else range(12)
    _check_schedules(call, harness, seeds)


def _check_schedules(call: Call, harness: runtime.Harness, seeds: Sequence[int]) -> None:
    data = data_of(call)
    results = []
    for seed in seeds:
        harness.configure(runtime.Schedule.of_seed(seed))
        with harness.choosing(max_smem_bytes=call.shared_bytes):
            results.append(run(harness, data))
    for i, other in enumerate(results[1:], 1):
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b), f"schedules 0 and {i} of this test differ"
    check(data, results[0])


def test_large_logits_and_those_that_are_none(harness: runtime.Harness) -> None:
    """+-1e4, -inf, inf and NaN, each at every column of a row: among vectors, before and behind."""
    V = 29  # bf16: two vectors, and edges at both ends
    target = torch.arange(V) * 7 % V
    for extreme in (1e4, -1e4, -torch.inf, torch.inf, torch.nan):
        logits = torch.randn(V, V + 4).bfloat16()[:, 3:-1]
        logits.diagonal().fill_(extreme)
        data = Data(Call("", V, V, reduction="none"), logits, target, torch.randn(V))
        check(data, run(harness, data))
    nothing = torch.full((2, V), -torch.inf, dtype=BF16)
    data = Data(Call("", 2, V, reduction="none"), nothing, target[:2], torch.randn(2))
    check(data, run(harness, data))


def test_targets_that_are_no_class(harness: runtime.Harness) -> None:
    """NaN in loss and gradient of their own row, and nothing out of bounds is read."""
    target = torch.tensor([0, IGNORED, 300, -7, 2**40, 299])
    data = Data(Call("", 6, 300, reduction="none"), torch.randn(6, 300), target, torch.randn(6))
    wrong = torch.tensor([False, False, True, True, True, False])
    for result in run(harness, data):
        assert torch.equal(result.isnan().reshape(6, -1).all(-1), wrong)
        assert torch.equal(result.isnan().reshape(6, -1).any(-1), wrong)
        assert not result[1].any()


def test_no_rows(harness: runtime.Harness) -> None:
    logits, target = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    for reduction, loss in (("sum", 0.0), ("mean", torch.nan)):
        data = Data(Call("", 0, 5, reduction=reduction), logits, target, torch.ones(()))
        found, dlogits, again = run(harness, data)
        torch.testing.assert_close(found, torch.tensor(loss), equal_nan=True)
        assert dlogits.shape == again.shape == (0, 5)
    harness.call("cross_entropy_scale_in_place", dlogits, torch.ones(()))


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("V", [1, 31, 2051])
def test_a_finished_gradient_is_scaled(
    V: int, dtype: torch.dtype, harness: runtime.Harness
) -> None:
    """One factor for all rows, and one each, of which 1 changes nothing."""
    dlogits = torch.randn(3, V).to(dtype)
    for factor in (torch.tensor(0.3), torch.tensor([2.0, 1.0, -0.7]), torch.ones(1).expand(3)):
        ours, right = dlogits.clone(), dlogits.clone()
        harness.call("cross_entropy_scale_in_place", ours, factor)
        reference.scale_in_place(right, factor)
        assert torch.equal(ours, right)


def test_refusals(harness: runtime.Harness) -> None:
    """What would be read or written out of bounds, in one sentence each."""
    x, t = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    options = (IGNORED, 0.0, 0.0, 0.0)
    one = torch.ones(())
    tall = x[:1, :1].expand(2**31, 1), t[:1].expand(2**31)
    wide = x[:1, :1].expand(1, 2**30 + 1), t[:1]
    fwd, in_place = "cross_entropy_fwd", "cross_entropy_bwd_in_place"
    for op, arguments, text in (
        (fwd, (*tall, *options, "sum", "never"), "fewer than 2^31 rows"),
        (fwd, (*wide, *options, "sum", "never"), "at most 2^30 classes"),
        (fwd, (x, t[:3], *options, "sum", "never"), "target must be [4]"),
        (fwd, (x, x[:, 0], *options, "sum", "never"), "target must hold integers, got Float"),
        (fwd, (x, t, *options, "avg", "never"), "one of mean, sum, none, got avg"),
        (fwd, (x.double(), t, *options, "sum", "never"), "logits must be float32"),
        (in_place, (one, x[:1].expand(4, 6), t, *options, "sum"), "contiguous rows apart"),
        (in_place, (one.double(), x, t, *options, "sum"), "dloss must be Float, got Double"),
        (in_place, (t[:3].float(), x, t, *options, "none"), "dloss must be [4]"),
        ("cross_entropy_scale_in_place", (x[:, :5], one), "dlogits must be contiguous"),
        (
            "cross_entropy_rows_in_place",
            (x, t, torch.empty(8)[::2], None, *options, True),
            "loss must be contiguous",
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            harness.call(op, *arguments)
        assert text in str(caught.value)


def _row_bytes(data: Data, tuning: dict[str, Any], loss: bool, weights: bool, count: bool) -> int:
    """Read by the rows' kernel with a gradient, by the formula at the top of its file."""
    call, size = data.call, data.logits.element_size()
    per_vector = VECTOR // size
    read = call.N * tuning["threads"] * data.target.element_size()
    for row in data.logits[data.counted]:
        head = -(row.data_ptr() // size) % per_vector
        vectors = max(call.V - head, 0) // per_vector
        again = max(vectors - tuning["kept_vectors"], 0) * per_vector
        read += (call.V + loss + again) * size + tuning["threads"] * 4 * (weights + count)
    return read


@needs_race
@pytest.mark.parametrize(
    "call",
    [pytest.param(c, marks=[pytest.mark.slow] * (c.V >= LONG)) for c in CALLS],
    ids=lambda call: call.why,
)
def test_moves_exactly_its_floor(call: Call) -> None:
    """Each logit read once, where its row fits in shared memory, and its gradient written once."""
    harness = runtime.load("race")
    data = data_of(call)
    size = data.logits.element_size()
    tuning = harness.module.cross_entropy_tuning(call.V, size, call.shared_bytes)
    mean = call.reduction == "mean"
    with harness.counting(max_smem_bytes=call.shared_bytes) as forward:
        harness.call("cross_entropy_fwd", *data.forward())
    with harness.counting(max_smem_bytes=call.shared_bytes) as backward:
        harness.call("cross_entropy_bwd", *data.backward())
    targets = call.N * data.target.element_size() * mean
    around = targets * 2 + 4 * call.N * (call.reduction != "none")
    gradient = call.N * call.V * size
    assert forward["global_read_bytes"] == around + _row_bytes(data, tuning, True, False, mean)
    written = gradient + 4 * call.N + 4 * mean + 4 * (call.reduction != "none")
    assert forward["global_write_bytes"] == written
    assert backward["global_read_bytes"] == targets + _row_bytes(data, tuning, False, True, mean)
    assert backward["global_write_bytes"] == gradient + 4 * mean
    for counts in (forward, backward):
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@needs_race
def test_a_dloss_of_one_moves_nothing() -> None:
    harness = runtime.load("race")
    N, V = 3, 515
    found = []
    for factor in (1.0, 0.5):
        with harness.counting() as counts:
            dlogits, dloss = torch.randn(N, V).bfloat16(), torch.tensor(factor)
            harness.call("cross_entropy_scale_in_place", dlogits, dloss)
        found.append((counts["global_read_bytes"], counts["global_write_bytes"]))
    threads = 256
    assert found == [(4 * threads * N, 0), (4 * threads * N + 2 * N * V, 2 * N * V)]


def test_tuning_keeps_to_every_gpu(harness: runtime.Harness) -> None:
    """No row asks for more than a block may have; a row that fits is kept whole, two where they
    can be; threads are whole warps.
    """
    tuning = harness.module.cross_entropy_tuning
    for limit in (runtime.LARGE_SHARED, runtime.MEDIUM_SHARED, runtime.SMALL_SHARED):
        for V in (1, 2, 255, 1024, 5000, 32000, 50257, 65536, 128256, 151936, 262144, 2**30):
            for size in (2, 4):
                found = tuning(V, size, limit)
                whole = found["kept_vectors"] == V * size // VECTOR
                assert found["shared_bytes"] <= limit and found["threads"] % 32 == 0
                assert whole or found["shared_bytes"] + VECTOR > limit
                both = 2 * (found["shared_bytes"] + 1024) <= limit + 1024
                assert (found["threads"] == 1024) == (not both)
    assert tuning(50257, 2, runtime.LARGE_SHARED)["threads"] == 512
    assert tuning(116_000, 2, runtime.LARGE_SHARED)["kept_vectors"] == 14_500


@needs_race
@pytest.mark.slow
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from every call that needs it: a warp
    alone does where a lane reads what another one keeps or overwrites.
    """
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in SHORT:
        data = data_of(call)
        shape = (call.V, call.dtype.itemsize, call.shared_bytes)
        alone = hunt.harness.module.cross_entropy_tuning(*shape)["threads"] == 32
        if call.gap or not alone:
            for op, arguments in (("fwd", data.forward()), ("bwd", data.backward())):
                hunt.drop_each(f"{op}, {call.why}", partial(_tensors, hunt.harness, op, arguments))
        if not call.gap and (not alone or call.V >= 256):
            hunt.drop_each(f"in place, {call.why}", partial(_in_place, hunt.harness, data))
    problems = hunt.problems(set((mutants.CSRC / "kernels").glob("cross_entropy*")))
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


def _tensors(harness: runtime.Harness, op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    found = harness.call(f"cross_entropy_{op}", *arguments)
    return [found] if isinstance(found, Tensor) else list(found)


def _in_place(harness: runtime.Harness, data: Data) -> list[Tensor]:
    """Loss and gradient as a linear layer's chunk makes them."""
    logits, loss = data.logits.clone(), torch.empty(data.call.N)
    options = data.options[:-1]
    harness.call("cross_entropy_rows_in_place", logits, data.target, loss, None, *options, True)
    return [loss, logits]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("cross_entropy_")
    harness = runtime.load(runtime.ONE)
    harness.configure()
    for call in SHORT:
        data = data_of(call)
        dlogits = run(harness, data)[1]
        harness.call("cross_entropy_scale_in_place", dlogits, torch.tensor(0.5))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert compiled and not compiled - ran, f"no call reaches {sorted(compiled - ran)}"
