"""The Hopper forward of attention on the harness: right bits in every schedule, bytes moved, and
every synchronisation dropped in turn. ``test_attention.py`` and its like run on the sm_80 kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import attention as reference
from fused_lm.tolerance import check_close
from tests import test_simt_attention_extremes as extremes
from tests.attention_bwd_calls import Call as BackwardCall
from tests.attention_calls import BF16, DTYPES, Call, data_of, in_fp64
from tests.attention_hopper_calls import HEAD_DIMS, HOPPER_CALLS, INSTANTIATIONS, SMALL_CALLS
from tests.golden import compiled_kernels
from tests.gpu import a_third, fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
GROUP_ROWS = 64
HOPPER = {"hopper": True}
FEW = [c for c in HOPPER_CALLS if (c in INSTANTIATIONS and c.dtype == BF16) or c.T == c.S == 300]
"""In two schedules: every kernel for bf16, and causal ones."""
BLOCKS = 2
"""Multiprocessors of the harness, which the grid has blocks for."""


class Hopper:
    """A harness on which the kernels for sm_90a run."""

    def __init__(self, harness: runtime.Harness) -> None:
        self.harness = harness

    def call(self, op: str, *arguments: Any) -> Any:
        with self.harness.choosing(**HOPPER):
            return self.harness.call(op, *arguments)


def _run(harness: runtime.Harness, data: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    out, lse = Hopper(harness).call("attention_fwd", *data)
    return out, lse


def _check(harness: runtime.Harness, call: Call, seeds: tuple[int, ...]) -> None:
    data = data_of(call)
    results = {}
    for seed in seeds:
        harness.configure(runtime.Schedule.of_seed(seed))
        results[seed] = _run(harness, data)
    first = results[seeds[0]]
    same, exact = reference.attention_forward(*data), in_fp64(data)
    for i, name in enumerate(("out", "lse")):
        check_close(first[i], same[i], exact[i], name)
    for seed, other in results.items():
        equal = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert equal, f"schedules {seeds[0]} and {seed} differ"


@pytest.mark.parametrize("call", FEW, ids=lambda call: call.why)
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (0, 6, 11) if harness.name == "plain" else (0, 11))


@pytest.mark.parametrize(
    "call", fp16_later((c for c in HOPPER_CALLS if c not in FEW), INSTANTIATIONS)
)
def test_one_schedule_gives_the_right_numbers(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (11,))


@pytest.mark.parametrize("call", a_third(SMALL_CALLS))
def test_every_feature(call: Call, harness: runtime.Harness) -> None:
    _check(harness, call, (7,))


@pytest.mark.parametrize("call", extremes.CALLS, ids=lambda call: call.why)
def test_large_scores(call: BackwardCall, harness: runtime.Harness) -> None:
    """With a backward from the lse."""
    extremes.check(Hopper(harness), call)


@pytest.mark.parametrize(
    "call",
    [
        BackwardCall("in turns", 140, 400, 128, H=1),
        BackwardCall("in turns, three groups", 200, 400, 64, H=1),
        BackwardCall("general", 140, 400, 128, H=1, softcap=1e6),
    ],
    ids=lambda call: call.why,
)
def test_rows_have_bits_of_their_own(call: BackwardCall, harness: runtime.Harness) -> None:
    extremes.check_rows(Hopper(harness), call)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_later_tokens_change_nothing_before(D: int, harness: runtime.Harness) -> None:
    """Causal: other keys and values behind a query leave its bits alone."""
    q, k, v, *rest = data_of(Call("causal", 260, 260, D, H=1, upper=0))
    before = _run(harness, (q, k, v, *rest))
    k[..., 200:, :], v[..., 200:, :] = 3.0, 100.0
    after = _run(harness, (q, k, v, *rest))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :200], b[:, :, :200])


def test_nan_stays_in_its_rows(harness: runtime.Harness) -> None:
    q, k, v, *rest = data_of(Call("full", 130, 200, 128, H=1))
    q[..., 7, :] = float("nan")
    out, lse = _run(harness, (q, k, v, *rest))
    assert out[..., 7, :].isnan().all() and lse[..., 7].isnan().all()
    others = torch.arange(130) != 7
    assert out[:, :, others].isfinite().all() and lse[:, :, others].isfinite().all()


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it. How
    long walks are decides which waits are needed: each is in one call at least.
    """
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, data_of(call)))
    of_others = {mutants.CSRC / name for name in ("common/warp.h", "kernels/attention_tile.h")}
    sources = mutants.sources_of("attention_fwd_sm90*") - of_others
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("in turns", 300, 520, 128, H=2, upper=200),
    Call("in turns, three groups", 500, 900, 64, H=1, upper=300),
    Call("out in q's place", 300, 520, 128, H=2),
    Call("in sequence", 300, 520, 64, H=2, softcap=4.0, dropout_p=0.2),
    Call("in sequence, out in q's place", 300, 300, 256, H=1, softcap=4.0),
    Call("in sequence, tiles passed over", 300, 300, 192, H=1, upper=0, softcap=4.0),
    Call("walks that end before they wait", 600, 100, 128, H=3, upper=300),
    Call("the same, out in q's place", 600, 100, 128, H=3),
    Call("tiles without a key between others", 500, 60, 128, H=2, lower=-300, upper=-90),
    Call("tiles without a key, out in q's place", 500, 40, 256, H=1, upper=-280),
]


def _tiles(call: Call) -> Iterator[tuple[int, list[int], int]]:
    """Per query tile its rows, how many keys each tile has that any of these rows sees, and how
    many products of a group with a tile there are: without those of the last tiles that none of the
    group's rows reaches, unless it reaches none at all.
    """
    tuning = _tuning(call)
    block_t, block_s = tuning["block_t"], tuning["block_s"]
    band = reference.visible(call.T, call.S, call.lower, call.upper, torch.device("cpu"))
    visible = torch.ones(call.T, call.S, dtype=torch.bool) if band is None else band
    upper = call.S if call.upper is None else call.upper
    for first in range(0, call.T, block_t):
        rows = visible[first : first + block_t]
        met = [i for i, t in enumerate(rows.split(block_s, dim=1)) if t.any()]
        products = block_t // GROUP_ROWS * len(met)
        if block_t > block_s:
            for last in range(first + GROUP_ROWS - 1, first + block_t, GROUP_ROWS):
                hidden = sum(i * block_s > last + upper for i in met)
                products -= max(min(hidden, len(met) - 1), 0)
        yield len(rows), [min(block_s, call.S - i * block_s) for i in met], products


def _tuning(call: Call) -> dict[str, Any]:
    module = runtime.load("race").module
    found: dict[str, Any] = module.attention_tuning_sm90(_head_dim(call), call.general)
    return found


def _head_dim(call: Call) -> int:
    return min(dim for dim in HEAD_DIMS if dim >= max(call.D, call.values))


PLAIN = [call for call in HOPPER_CALLS if not call.general]


@needs_race
@pytest.mark.parametrize("call", a_third(PLAIN))
def test_moves_exactly_its_floor(call: Call) -> None:
    """q once, the keys that a query tile sees, out and lse once; the products of whole tiles, which
    read k, v and q where wgmma reads them; no bank conflict.
    """
    harness = runtime.load("race")
    with harness.counting(**HOPPER) as counts:
        harness.call("attention_fwd", *data_of(call))
    tuning, D = _tuning(call), _head_dim(call)
    block_s = tuning["block_s"]
    heads, tiles = call.B * call.H, list(_tiles(call))
    met = [(rows, keys) for rows, keys, _ in tiles if keys]
    loaded = sum(2 * rows * call.D + 2 * sum(keys) * (call.D + call.values) for rows, keys in met)
    products = sum(products for *_, products in tiles)
    # Where there are more tiles than blocks, the counter is read and raised once per tile.
    blocks = min(BLOCKS, heads * len(tiles))
    taken = 4 * heads * len(tiles) if heads * len(tiles) > BLOCKS else 0
    assert counts["global_read_bytes"] == heads * loaded + taken
    assert counts["global_write_bytes"] == heads * call.T * (2 * call.values + 4) + taken
    assert counts["blocks"] == blocks
    assert counts["wgmma_flops"] == heads * products * 4 * GROUP_ROWS * block_s * D
    of_scores, of_sums = (GROUP_ROWS + block_s) * D, block_s * D
    assert counts["wgmma_shared_bytes"] == heads * products * 2 * (of_scores + of_sums)
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("attention_fwd_sm90")
    assert len(compiled) == len(DTYPES) * 2 * len(HEAD_DIMS)
    harness = runtime.load(runtime.ONE)
    assert tuple(harness.module.HOPPER_HEAD_DIMS) == HEAD_DIMS
    harness.configure()
    for call in INSTANTIATIONS:
        _run(harness, data_of(replace(call, T=1, S=1)))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of INSTANTIATIONS reaches {sorted(compiled - ran)}"
