"""The Hopper backward of attention on the harness: right numbers in every schedule, bytes moved,
and every synchronisation dropped in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.cuda.attention import IN_ANY_ORDER, IN_ORDER
from fused_lm.reference import attention as reference
from fused_lm.tolerance import check_close
from tests import test_simt_attention_extremes as extremes
from tests.attention_bwd_calls import Call, Data
from tests.attention_bwd_hopper_calls import (
    GROUP_ROWS,
    GROUPS,
    HEAD_DIMS,
    HOPPER_CALLS,
    INSTANTIATIONS,
    LONG_ROWS,
    SMALL_CALLS,
    WIDE,
    operands_of_group,
)
from tests.attention_calls import BF16
from tests.golden import compiled_kernels
from tests.gpu import a_third, fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
HOPPER = {"hopper": True}
FEW = [call for call in INSTANTIATIONS if call.dtype == BF16 and call.D != 192]
"""In two schedules; the kernels of 192 columns are those of 256."""
NARROW = [
    call for call in HOPPER_CALLS if max(call.D, call.values) <= WIDE or call in INSTANTIATIONS
]
WIDER = [call for call in HOPPER_CALLS if call not in NARROW]
"""In one schedule: a third of those of the wide kernels in `make test`."""
ROW_LANES = 8
"""That read a row's lse and dlse in attention_bwd_prepare."""
HUGE_BYTES = 16
"""Of csrc/kernels/attention_bwd_tuning_sm90.h."""


class HopperBackward:
    """A harness on which the kernels for sm_90a run, both ways."""

    def __init__(self, harness: runtime.Harness, dq_slots: int = IN_ANY_ORDER) -> None:
        self.harness = harness
        self.dq_slots = dq_slots

    def call(self, op: str, *arguments: Any) -> Any:
        if op == "attention_bwd":
            op, arguments = "attention_bwd_sm90", (*arguments, self.dq_slots)
        with self.harness.choosing(**HOPPER):
            return self.harness.call(op, *arguments)


def _run(harness: runtime.Harness, data: Data, dq_slots: int = IN_ANY_ORDER) -> Sequence[Tensor]:
    results: Sequence[Tensor] = HopperBackward(harness, dq_slots).call(
        "attention_bwd", *data.arguments
    )
    return results


def _check(harness: runtime.Harness, call: Call, seeds: tuple[int, ...]) -> None:
    """dk and dv have the same bits in every schedule; dq is a sum in any order."""
    data = Data.of(call)
    results = {}
    for seed in seeds:
        harness.configure(runtime.Schedule.of_seed(seed))
        results[seed] = _run(harness, data)
    first = results[seeds[0]]
    for seed, found in results.items():
        for i, name in enumerate(("dq", "dk", "dv", "dbias")):
            check_close(found[i], data.same[i], data.exact[i], f"{name}, schedule {seed}")
            assert found[i].stride() == data.same[i].stride()
        equal = all(torch.equal(a, b) for a, b in zip(first[1:], found[1:], strict=True))
        assert equal, f"schedules {seeds[0]} and {seed} differ"


@pytest.mark.parametrize("call", FEW, ids=lambda call: call.why)
def test_every_schedule_gives_the_right_numbers(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (0, 11))


@pytest.mark.parametrize(
    "call", fp16_later((c for c in NARROW if c not in FEW), INSTANTIATIONS) + a_third(WIDER)
)
def test_one_schedule_gives_the_right_numbers(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (11,))


ORDERED = [
    (Call("several tiles of keys", 200, 500, 128, H=2, group=2, upper=330), 3),
    (Call("a launch for each tile", 200, 300, 64, H=1, softcap=4.0, dropout_p=0.2), 1),
    (Call("causal of 64 columns", 400, 400, 64, B=2, H=1, upper=0), 2),
    (Call("of 96 columns", 200, 500, 96, H=1), 1),
    (Call("wide", 200, 230, 256, H=1, upper=100), 3),
]
"""With how many slots: launches of a tile of keys each, and launches whose last is not whole."""
SEEDS = (0, 11, 22)


@needs_race  # which runs blocks in any order
@pytest.mark.parametrize(
    ("call", "slots"),
    [
        pytest.param(*each, id=each[0].why, marks=[pytest.mark.slow] if i != 1 else [])
        for i, each in enumerate(ORDERED)
    ],
)
def test_ordered_sums_have_the_same_bits(call: Call, slots: int) -> None:
    """In every order of blocks and copies."""
    data = Data.of(call)
    results = _in_every_order(data, slots)
    for i, name in enumerate(("dq", "dk", "dv", "dbias")):
        check_close(results[0][i], data.same[i], data.exact[i], name)
        assert all(torch.equal(results[0][i], other[i]) for other in results), name


def _in_every_order(data: Data, slots: int) -> list[Sequence[Tensor]]:
    harness, results = runtime.load("race"), []
    for seed in SEEDS:
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(_run(harness, data, slots))
    return results


@needs_race
def test_an_order_that_shows_in_the_bits() -> None:
    """Of three tiles of keys two cancel, and are so large that what is left of the third depends on
    when it was added: in any order it differs, in theirs never.
    """
    q, k, v, dout = (torch.randn(1, 1, rows, 64).to(BF16) for rows in (64, 300, 300, 64))
    q.zero_()
    k[..., :128, :] *= 2.0**18
    k[..., 128:256, :], v[..., 128:256, :] = -k[..., :128, :], v[..., :128, :]
    score = (None, None, None, None, None, None, 0.1, 0.0, 0.0)
    out, lse = reference.attention_forward(q, k, v, *score)
    data = Data((dout, None, q, k, v, out, lse, *score, False), (), (), 0)
    for slots in (1, 2, 3):
        first, *others = (results[0] for results in _in_every_order(data, slots))
        assert all(torch.equal(first, other) for other in others)
    first, *others = (results[0] for results in _in_every_order(data, IN_ANY_ORDER))
    assert not all(torch.equal(first, other) for other in others)


@needs_race
def test_who_leaves_the_slots_to_the_tuning_gets_equal_bits() -> None:
    harness, data = runtime.load("race"), Data.of(Call("three tiles of keys", 70, 300, 64, H=1))
    results = []
    for seed in SEEDS:
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(_run(harness, data, IN_ORDER))
    for i, name in enumerate(("dq", "dk", "dv")):
        check_close(results[0][i], data.same[i], data.exact[i], name)
        assert all(torch.equal(results[0][i], other[i]) for other in results), name
    with pytest.raises(RuntimeError, match="dq_slots must be"):
        _run(harness, data, -2)


H200 = 132
TRAINING = [
    (tokens // T, width // D, T, D)
    for D, width in ((64, 2048), (128, 2048), (256, 2048))
    for tokens in (16384, 32768)
    for T in (1024, 2048, 4096, 8192, 16384)
]


@pytest.mark.parametrize("B, H, T, D", TRAINING)
def test_ordered_sums_cost_a_tenth_at_most_by_arithmetic(B: int, H: int, T: int, D: int) -> None:
    """Of all of the backward, at the sizes of the benchmarks; above 128 columns a seventh, since
    half the columns of a width are half the heads, which need twice the slots.
    """
    found = runtime.load(runtime.ONE).module.attention_bwd_slots_sm90([B, H, 1, T, T, D, D], H200)
    assert found["slots"] > 0
    assert found["clocks"] <= (1.1 if D <= 128 else 1.15) * found["in_any_order"]
    assert found["bytes"] <= 3 << 30


def test_without_room_for_slots_the_two_passes_run() -> None:
    found = runtime.load(runtime.ONE).module.attention_bwd_slots_sm90(
        [1, 32, 4, 65536, 65536, 128, 128], H200
    )
    assert found["slots"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("call", SMALL_CALLS, ids=lambda call: call.why)
def test_every_feature(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (7,))


@pytest.mark.parametrize("call", extremes.CALLS, ids=lambda call: call.why)
def test_large_scores(call: Call, harness: runtime.Harness) -> None:
    extremes.check(HopperBackward(harness), call)


def test_nan_stays_in_its_rows(harness: runtime.Harness) -> None:
    """Of dq; dk and dv sum over all queries."""
    data = Data.of(Call("full", 200, 200, 128, H=1, dlse=False))
    dout = data.arguments[0].clone()
    dout[..., 7, :] = float("nan")
    dq, *_ = _run(harness, Data((dout, *data.arguments[1:]), data.same, data.exact, 0))
    others = torch.arange(200) != 7
    assert dq[..., 7, :].isnan().all() and dq[:, :, others].isfinite().all()


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, Data.of(call)))
    of_others = {mutants.CSRC / name for name in ("common/warp.h", "kernels/attention_tile.h")}
    sources = mutants.sources_of("attention_bwd_*sm90_*.cu") - of_others
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("several tiles of several heads", 330, 200, 128, H=2, group=2, upper=200),
    Call("the same of 64 columns", 600, 200, 64, H=2, group=2, upper=200),
    Call("the same of 96 columns", 400, 200, 96, H=2, group=2, upper=200),
    Call("general", 300, 200, 128, H=1, softcap=4.0, dropout_p=0.2),
    Call("general, dq from registers", 300, 200, 64, H=1, softcap=4.0, dropout_p=0.2),
    Call("no band", 330, 200, 128, H=1),
    Call("one tile", 40, 200, 128, H=1),
    Call("keys that no query sees", 60, 300, 64, H=1, upper=0),
    Call("wide: several tiles of several heads", 270, 70, 192, H=2, group=2, upper=70),
    Call("wide: one place for q", 400, 70, 256, H=1),
    Call("wide, general", 200, 70, 256, H=1, softcap=4.0, dropout_p=0.2),
    Call("wide: one tile, keys that no query sees", 40, 100, 192, H=1, upper=0),
]

PLAIN = [call for call in HOPPER_CALLS if not call.general]


def _tiles(call: Call, block_t: int, block_s: int) -> list[tuple[int, list[int]]]:
    """Per block its keys, and how many queries each tile has of which any sees one of them."""
    band = reference.visible(call.T, call.S, call.lower, call.upper, torch.device("cpu"))
    visible = torch.ones(call.T, call.S, dtype=torch.bool) if band is None else band
    return [
        (part.shape[1], [len(rows) for rows in part.split(block_t) if rows.any()])
        for part in visible.split(block_s, dim=1)
    ]


@needs_race
def test_slots_are_written_and_read_once_more() -> None:
    _check_floor(Call("three tiles of keys", 70, 300, 64, H=1), 2)


@needs_race
@pytest.mark.parametrize("call", a_third(PLAIN))
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas at the top of the kernels."""
    _check_floor(call, IN_ANY_ORDER)


def _check_floor(call: Call, slots: int) -> None:
    harness = runtime.load("race")
    with harness.counting(**HOPPER) as counts:
        harness.call("attention_bwd_sm90", *Data.of(call).arguments, slots)
    D = next(dim for dim in HEAD_DIMS if dim >= max(call.D, call.values))
    has_band = (call.upper or 0) < call.S and call.upper is not None
    has_band |= call.lower is not None and call.lower > -call.T
    tuning = harness.module.attention_bwd_tuning_sm90(D, False, 0 if has_band else call.T)
    block_t, block_s, columns = tuning["block_t"], tuning["block_s"], 2 * (call.D + call.values)
    loaded = added = products = 0
    for keys, tiles in _tiles(call, block_t, block_s):
        loaded += keys * columns * bool(tiles)
        loaded += call.group * sum(rows * columns + 8 * block_t + HUGE_BYTES for rows in tiles)
        added += call.group * len(tiles) * 4 * block_t * D
        products += call.group * len(tiles)
    heads, groups = call.B * call.H, call.B * call.H // call.group
    rows, padded = heads * call.T, heads * -(-call.T // block_t) * block_t
    prepared = rows * (4 * call.values + ROW_LANES * (4 + 4 * call.dlse))
    sums = max(slots, 1) * padded * 4 * D
    assert counts["global_read_bytes"] == prepared + groups * (loaded + added) + sums
    huge = heads * -(-call.T // block_t) * HUGE_BYTES
    written = padded * 8 + sums + huge + rows * 2 * call.D + groups * call.S * columns
    assert counts["global_write_bytes"] == written + groups * added
    dims = 4 * D + -(-D // GROUP_ROWS) * GROUP_ROWS
    assert counts["wgmma_flops"] == groups * products * 2 * block_t * block_s * dims
    operands = operands_of_group(D, block_t, block_s)
    assert counts["wgmma_shared_bytes"] == groups * products * GROUPS * 2 * operands
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels(("attention_bwd_sm90", "attention_bwd_wide_sm90"))
    assert len(compiled) == 3 * len(INSTANTIATIONS)
    harness = runtime.load(runtime.ONE)
    assert tuple(harness.module.HOPPER_BACKWARD_HEAD_DIMS) == HEAD_DIMS
    harness.configure()
    for call in INSTANTIATIONS:
        upper = None if call.upper is None else 0  # a band, which tiles of 80 don't have
        _run(harness, Data.of(replace(call, T=min(call.T, LONG_ROWS), S=1, upper=upper)))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of INSTANTIATIONS reaches {sorted(compiled - ran)}"
