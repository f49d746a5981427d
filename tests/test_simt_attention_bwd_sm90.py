"""The Hopper backward of attention on the harness: right numbers in every schedule, bytes moved,
and every synchronisation dropped in turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
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
    SMALL_CALLS,
    WIDE,
    operands_of_group,
)
from tests.attention_calls import BF16, DTYPES
from tests.gpu import fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
HOPPER = {"hopper": True}
FEW = [call for call in INSTANTIATIONS if call.dtype == BF16 and call.D != 192]
"""In two schedules; the kernels of 192 columns are those of 256."""
ROW_LANES = 8
"""That read a row's lse and dlse in attention_bwd_prepare."""
HUGE_BYTES = 16
"""Of csrc/kernels/attention_bwd_tuning_sm90.h."""


class HopperBackward:
    """A harness on which the kernels for sm_90a run, both ways."""

    def __init__(self, harness: runtime.Harness) -> None:
        self.harness = harness

    def call(self, op: str, *arguments: Any) -> Any:
        with self.harness.choosing(**HOPPER):
            return self.harness.call(op.replace("_bwd", "_bwd_sm90"), *arguments)


def _run(harness: runtime.Harness, data: Data) -> Sequence[Tensor]:
    results: Sequence[Tensor] = HopperBackward(harness).call("attention_bwd", *data.arguments)
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
    "call", fp16_later((c for c in HOPPER_CALLS if c not in FEW), INSTANTIATIONS)
)
def test_one_schedule_gives_the_right_numbers(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (11,))


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
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, Data.of(call)))
    of_others = {mutants.CSRC / name for name in ("common/warp.h", "kernels/attention_tile.h")}
    sources = mutants.sources_of("attention_bwd_*sm90_*.cu") - of_others
    hunt.alive = {key: calls for key, calls in hunt.alive.items() if key not in hunt.killed}
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("several tiles of several heads", 330, 200, 128, H=2, group=2, upper=200),
    Call("the same of 64 columns", 600, 200, 64, H=2, group=2, upper=200),
    Call("the same of 96 columns", 400, 200, 96, H=2, group=2, upper=200),
    Call("general", 300, 200, 128, H=1, softcap=4.0, dropout_p=0.2),
    Call("general, dq from registers", 300, 200, 64, H=1, softcap=4.0, dropout_p=0.2),
    Call("one tile", 40, 200, 128, H=1),
    Call("keys that no query sees", 60, 300, 64, H=1, upper=0),
    Call("wide: several tiles of several heads", 270, 70, 192, H=2, group=2, upper=70),
    Call("wide: one place for q", 400, 70, 256, H=1),
    Call("wide, general", 200, 70, 256, H=1, softcap=4.0, dropout_p=0.2),
    Call("wide: one tile, keys that no query sees", 40, 100, 192, H=1, upper=0),
]

SLOW = [
    call
    for call in HOPPER_CALLS
    if call.dtype != BF16 or (max(call.D, call.values) > WIDE and call not in INSTANTIATIONS)
]
"""Other types move the same bytes, and the wide kernels walk over tiles as the others do."""
PLAIN = [
    pytest.param(call, marks=[pytest.mark.slow] if call in SLOW else [], id=call.why)
    for call in HOPPER_CALLS
    if not call.general
]


def _tiles(call: Call, block_t: int, block_s: int) -> list[tuple[int, list[int]]]:
    """Per block its keys, and how many queries each tile has of which any sees one of them."""
    band = reference.visible(call.T, call.S, call.lower, call.upper, torch.device("cpu"))
    visible = torch.ones(call.T, call.S, dtype=torch.bool) if band is None else band
    return [
        (part.shape[1], [len(rows) for rows in part.split(block_t) if rows.any()])
        for part in visible.split(block_s, dim=1)
    ]


@needs_race
@pytest.mark.parametrize("call", PLAIN)
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas at the top of the kernels."""
    harness = runtime.load("race")
    with harness.counting(**HOPPER) as counts:
        harness.call("attention_bwd_sm90", *Data.of(call).arguments)
    D = next(dim for dim in HEAD_DIMS if dim >= max(call.D, call.values))
    tuning = harness.module.attention_bwd_tuning_sm90(D, False)
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
    assert counts["global_read_bytes"] == prepared + groups * (loaded + added) + padded * 4 * D
    huge = heads * -(-call.T // block_t) * HUGE_BYTES
    written = padded * (8 + 4 * D) + huge + rows * 2 * call.D + groups * call.S * columns
    assert counts["global_write_bytes"] == written + groups * added
    dims = 4 * D + -(-D // GROUP_ROWS) * GROUP_ROWS
    assert counts["wgmma_flops"] == groups * products * 2 * block_t * block_s * dims
    operands = operands_of_group(D, block_t, block_s)
    assert counts["wgmma_shared_bytes"] == groups * products * GROUPS * 2 * operands
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    golden = sorted((Path(__file__).parent / "golden").glob("cuda-*.json"))[-1]
    compiled = {
        place.split(" ", 2)[2]
        for place in json.loads(golden.read_text())
        if place.split(" ")[1].startswith(("attention_bwd_sm90", "attention_bwd_wide_sm90"))
    }
    assert len(compiled) == 3 * len(DTYPES) * 2 * len(HEAD_DIMS)
    harness = runtime.load(runtime.ONE)
    assert tuple(harness.module.HOPPER_BACKWARD_HEAD_DIMS) == HEAD_DIMS
    harness.configure()
    for call in INSTANTIATIONS:
        _run(harness, Data.of(call))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of INSTANTIATIONS reaches {sorted(compiled - ran)}"
