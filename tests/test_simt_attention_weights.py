"""The CUDA attention weights on the harness: shapes that reach every branch, all schedules, bytes
moved, bank conflicts, tiles passed over, and every synchronisation dropped in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_lm.reference import attention as reference
from fused_lm.tolerance import check_close
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SCHEDULES = 4
BLOCK_T, BLOCK_S, SLICE = 64, 64, 64
"""Of csrc/kernels/attention_tuning.h."""
OF_OTHERS = {mutants.CSRC / "kernels/attention_tile.h", mutants.CSRC / "common/warp.h"}
"""Synchronise in store_sums and warps_sum, which these kernels don't call."""


@dataclass(frozen=True)
class Call:
    """One call; ``why`` is what it is there for."""

    why: str
    T: int = 37
    S: int = 40
    D: int = 64
    B: int = 1
    H: int = 2
    heads: int | None = None
    dtype: torch.dtype = BF16
    mask: tuple[int, ...] | None = None
    key_mask: bool = False
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    lower: int | None = None
    upper: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    average: bool = False
    rows_first: bool = False


CALLS = [
    Call("one tile, one slice"),
    Call("the mean of heads", H=3, average=True),
    Call("slices: the last one is not whole", D=200, dtype=F16),
    Call("slices, and a mean over batches", B=2, D=128, average=True),
    Call("the narrowest head, odd rows", S=37, D=8),
    Call("odd rows in several tiles", T=130, S=129, D=40),
    Call("one query, one key", T=1, S=1, D=8),
    Call("a wide head", T=5, S=9, D=256, dtype=F16),
    Call("heads that share keys", H=6, heads=2, rows_first=True),
    Call("causal, with tiles that nobody sees", T=140, S=140, upper=0),
    Call("a window, in the mean", T=140, S=140, lower=-9, upper=3, average=True),
    Call("rows without a key", T=40, S=15, upper=-25),
    Call("every tile is outside of the band", T=20, S=64, lower=64),
    Call("a mask in octets", mask=(1, 2, 37, 40)),
    Call("a mask per query, odd keys", S=37, mask=(1, 1, 37, 1), key_mask=True),
    Call("a bias per head", bias=(1, 2, 37, 40)),
    Call("fp32 bias per key beside fp16", dtype=F16, bias=(1, 2, 1, 40), bias_dtype=F32),
    Call("a mask of each batch and head", B=2, heads=1, mask=(2, 2, 37, 40), key_mask=True),
    Call("a bias of each, in the mean", B=2, H=4, heads=2, bias=(2, 4, 37, 40), average=True),
    Call("softcap", softcap=2.0, bias=(1, 1, 1, 1)),
    Call("dropout", T=70, S=72, dropout_p=0.3),
    Call("dropout of each batch", B=2, H=4, heads=2, dropout_p=0.3),
    Call("dropout in the mean, odd rows", S=71, H=4, heads=2, dropout_p=0.3, average=True),
    Call("everything is dropped", dropout_p=1.0),
]


@dataclass
class Data:
    """Arguments of a call: with the lse of its own forward, exact but for its rounding."""

    q: Tensor
    k: Tensor
    exact_lse: Tensor
    score: tuple[Any, ...]
    average: bool

    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.exact_lse.float(), *self.score, self.average)

    def exact(self) -> Tensor:
        arguments = (self.q, self.k, self.exact_lse, *self.score, self.average)
        return reference.attention_weights_forward(*_wide(arguments))


def _wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating-point tensors in fp64."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def data_of(c: Call) -> Data:
    def heads(count: int, length: int) -> Tensor:
        if c.rows_first:
            return torch.randn(c.B, length, count, c.D).to(c.dtype).transpose(1, 2)
        return torch.randn(c.B, count, length, c.D).to(c.dtype)

    q, k = heads(c.H, c.T), heads(c.heads or c.H, c.S)
    mask = None if c.mask is None else torch.rand(c.mask) > 0.3
    key_mask = torch.rand(c.B, c.S) > 0.3 if c.key_mask else None
    bias = None if c.bias is None else torch.randn(c.bias).to(c.bias_dtype or c.dtype)
    rng = torch.tensor([12345678901, 3, 1, 2]) if c.dropout_p > 0 else None
    tail = (c.lower, c.upper, c.D**-0.5, c.softcap, c.dropout_p)
    score = (mask, key_mask, bias, rng, *tail)
    _, lse = reference.attention_forward(*_wide((q, k, k, *score)))
    return Data(q, k, lse, score, c.average)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    data = data_of(call)
    results = []
    for seed in (0, 11) if runtime.sanitized() else range(SCHEDULES):
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(harness.call("attention_weights_fwd", *data.arguments()))
    for other in results[1:]:
        assert torch.equal(results[0], other)
    assert results[0].is_contiguous()
    same = reference.attention_weights_forward(*data.arguments())
    check_close(results[0], same, data.exact())


@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_moves_exactly_its_floor(call: Call) -> None:
    """The output once, and nothing else; products of visible tiles alone; no bank conflict."""
    harness = runtime.load("race")
    data = data_of(call)
    with harness.counting() as counts:
        weights = harness.call("attention_weights_fwd", *data.arguments())
    planes = call.B if call.average else call.B * call.H
    assert counts["global_write_bytes"] == planes * call.T * call.S * 2
    assert weights.numel() == planes * call.T * call.S
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]
    columns = -(-call.D // SLICE) * SLICE
    tiles = call.B * call.H * _visible_tiles(call)
    assert counts["mma_flops"] == tiles * 2 * BLOCK_T * BLOCK_S * columns


def _visible_tiles(call: Call) -> int:
    """Tiles of [T, S] in which the band shows a key to a query."""
    cpu = torch.device("cpu")
    seen = reference.visible(call.T, call.S, call.lower, call.upper, cpu)
    if seen is None:
        seen = torch.ones(call.T, call.S, dtype=torch.bool)
    rows = seen.split(BLOCK_T, 0)
    return sum(bool(tile.any()) for part in rows for tile in part.split(BLOCK_S, 1))


@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
@pytest.mark.parametrize("average", [False, True])
def test_whole_sectors(average: bool) -> None:
    """Rows of whole tiles: nothing is fetched or written beside what is asked for."""
    harness = runtime.load("race")
    data = data_of(Call("whole tiles", 128, 128, 128, average=average))
    with harness.counting() as counts:
        harness.call("attention_weights_fwd", *data.arguments())
    assert counts["global_sectors"] == counts["global_ideal_sectors"]


@pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernel, dropped in turn from every call that passes it."""
    hunt = mutants.Hunt(runtime.load("race"), SCHEDULES)
    for call in CALLS:
        run = partial(hunt.harness.call, "attention_weights_fwd", *data_of(call).arguments())
        hunt.drop_each(call.why, lambda run=run: [run()])  # type: ignore[misc]
    problems = hunt.problems(mutants.sources_of("attention_weights*") - OF_OTHERS)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernel synchronises nowhere?"
