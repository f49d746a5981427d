"""The packed backward for Hopper on the harness: right numbers in every schedule, what lies in the
next sequence, bytes moved, and every synchronisation dropped in turn.
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
from fused_lm.cuda.attention import IN_ANY_ORDER
from fused_lm.reference import attention_varlen as reference
from fused_lm.tolerance import check_close
from tests.attention_bwd_hopper_calls import GROUPS, operands_of_group
from tests.attention_varlen_bwd_calls import CALLS, Data
from tests.attention_varlen_calls import (
    ANY_BOUNDS,
    BF16,
    HEAD_DIMS,
    KERNELS,
    LANES,
    POISONED,
    Call,
    Layout,
    bounds_of,
    sought,
    span_of,
    visible,
)
from tests.golden import compiled_kernels
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
NAMES = ("dq", "dk", "dv")
MUTANT_SCHEDULES = 6
ROW_LANES, HUGE_BYTES = 8, 16
ROWS_WARPS, MAIN_WARPS = 8, 12
"""Of a block: all of them look for its sequence."""
FEW = ("plain, bf16 64", "general, bf16 128", "empty ones on both sides")
"""In two schedules."""
BRANCHES = (
    *("no key at all", "no query at all", "no sequence", "lengths around an edge of 64"),
    *("key tiles that no query sees", "a bound that hides everything", "a window from the end"),
    *("plain, bf16 256", "heads first", "off 16 bytes", "expanded heads", "columns apart"),
    *("slabs of 32 columns", "scale 0", "scores of 1e5"),
)
"""Of the packed kernels, once each; what lies within one sequence is the dense ones' too."""


def _run(harness: runtime.Harness, arguments: tuple[Any, ...]) -> Sequence[Tensor]:
    with harness.choosing(hopper=True):
        results: Sequence[Tensor] = harness.call("attention_varlen_bwd", *arguments)
    return results


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(c, id=c.why, marks=[] if c.why in (*FEW, *BRANCHES) else [pytest.mark.slow])
        for c in CALLS
    ],
)
def test_every_schedule_gives_the_right_numbers(call: Call, harness: runtime.Harness) -> None:
    """dk and dv with the same bits."""
    data = Data.of(call)
    results = []
    for seed in (0, 11) if call.why in FEW or harness.name == "plain" else (11,):
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(_run(harness, data.arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][1:], other[1:], strict=True))
    for i, name in enumerate(NAMES):
        check_close(results[0][i], data.same[i], data.exact[i], name)
        assert results[0][i].is_contiguous()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(c, id=c.why, marks=[] if c.D in (128, 256) else [pytest.mark.slow])
        for c in POISONED
    ],
)
def test_neighbours_stay_outside(call: Call, harness: runtime.Harness) -> None:
    """Whatever the other sequences hold, a sequence's gradients keep their bits."""
    arguments = list(Data.of(call).arguments)
    clean = _run(harness, tuple(arguments))
    rows_left, keys_left = torch.ones(sum(call.T)).bool(), torch.ones(sum(call.S)).bool()
    for i, poison in ((1, float("inf")), (2, float("nan")), (4, float("nan"))):
        rows, keys = slice(*span_of(call.T, i)), slice(*span_of(call.S, i))
        for place in (0, 2, 5):  # dout, q, out
            arguments[place] = arguments[place].clone()
            arguments[place][rows] = poison
        for place in (3, 4):  # k, v
            arguments[place] = arguments[place].clone()
            arguments[place][keys] = poison
        rows_left[rows], keys_left[keys] = False, False
    dirty = _run(harness, tuple(arguments))
    for i, left in enumerate((rows_left, keys_left, keys_left)):
        assert left.any() and torch.equal(dirty[i][left], clean[i][left]), NAMES[i]
    assert not dirty[0][~rows_left].isfinite().all()


def test_a_sequence_has_the_bits_that_it_has_alone(harness: runtime.Harness) -> None:
    """Those of the dense backward too, whose walks these are."""
    call = Call("two", (70, 140), (140, 100), upper=0, at_end=True, H=1)
    dout, dlse, q, k, v, out, lse, _, _, *rest = Data.of(call).arguments
    bounds = (bounds_of(call.T), bounds_of(call.S))
    packed = _run(harness, (dout, dlse, q, k, v, out, lse, *bounds, *rest))
    for i in range(2):
        rows, keys = slice(*span_of(call.T, i)), slice(*span_of(call.S, i))
        own = [None if dlse is None else dlse[:, rows], q[rows], k[keys], v[keys], out[rows]]
        one = [bounds_of(lengths[i : i + 1]) for lengths in (call.T, call.S)]
        alone = _run(harness, (dout[rows], *own, lse[:, rows], *one, *rest))
        dense = [None if t is None else reference.as_heads(t) for t in own[1:]]
        upper = call.S[i] - call.T[i]
        row_values = [None if t is None else t[None] for t in (own[0], lse[:, rows])]
        with harness.choosing(hopper=True):
            of_dense = harness.call(
                "attention_bwd_sm90",
                *(reference.as_heads(dout[rows]), row_values[0], *dense, row_values[1]),
                *(None, None, None, None, None, upper, call.D**-0.5, 0.0, 0.0, False),
                IN_ANY_ORDER,
            )
        for j, place in enumerate((rows, keys, keys)):
            assert torch.equal(packed[j][place], alone[j]), NAMES[j]
            assert torch.equal(packed[j][place].transpose(0, 1), of_dense[j][0]), NAMES[j]


@pytest.mark.parametrize(("bounds_q", "bounds_k"), ANY_BOUNDS, ids=str)
def test_any_bounds_are_safe(
    bounds_q: list[int], bounds_k: list[int], harness: runtime.Harness
) -> None:
    """Nothing is read or written outside of the tensors."""
    q, k, v = (torch.randn(rows, 2, 128).to(BF16) for rows in (300, 200, 200))
    bounds = [torch.tensor(b) for b in (bounds_q, bounds_k)]
    lse = torch.randn(2, 300)
    arguments = (q, None, q, k, v, q, lse, *bounds, None, None, False, 0.1, 0.0)
    for gradient, like in zip(_run(harness, arguments), (q, k, v), strict=True):
        assert gradient.shape == like.shape


def test_is_for_hopper_alone(harness: runtime.Harness) -> None:
    with pytest.raises(RuntimeError, match=r"kernels for Hopper \(sm_90a\) alone"):
        harness.call("attention_varlen_bwd", *Data.of(Call("any", (3,), (4,))).arguments)


ERRORS: list[tuple[dict[int, Any], str]] = [
    ({0: torch.zeros(5, 2, 32).half()}, r"must be \[N, H, Dv\]"),
    ({5: torch.zeros(4, 2, 64).half()}, r"must be \[N, H, Dv\]"),
    ({0: torch.zeros(5, 2, 64)}, "out and dout must be"),
    ({1: torch.zeros(5, 2)}, r"must be \[H, N\]"),
    ({6: torch.zeros(2, 5).double()}, "lse and dlse must be"),
    ({3: torch.zeros(7, 2, 32).half()}, "share D"),
    ({7: torch.zeros(2)}, "must be int32 or int64"),
]


@pytest.mark.parametrize(("changed", "text"), ERRORS, ids=lambda value: str(value)[:30])
def test_wrong_pointers_are_refused(
    changed: dict[int, Any], text: str, harness: runtime.Harness
) -> None:
    arguments = list(Data.of(Call("any", (2, 3), (3, 4), dtype=torch.float16)).arguments)
    for place, tensor in changed.items():
        arguments[place] = tensor
    with pytest.raises(RuntimeError, match=text):
        _run(harness, tuple(arguments))


def _seeks(bounds: list[int], block: int, warps: int) -> int:
    """Bounds that the blocks of a head read: a warp's search, and those of its sequence by every
    lane.
    """
    tiles = bounds[-1] // block + len(bounds) - 1
    return warps * sum(sought(bounds, tile, block)[1] + 2 * LANES for tile in range(tiles))


MOVED = [
    call
    for call in CALLS
    if not call.general and sum(call.T) * sum(call.S) and call.layout is Layout.DENSE
]


@needs_race
@pytest.mark.parametrize(
    "call",
    [pytest.param(c, id=c.why, marks=[] if c.why in FEW else [pytest.mark.slow]) for c in MOVED],
)
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas at the top of the kernels; boxes are read as far as the tensor goes."""
    harness = runtime.load("race")
    data = Data.of(call)
    with harness.counting(hopper=True) as counts:
        harness.call("attention_varlen_bwd", *data.arguments)
    D = call.head_dim
    tuning = harness.module.attention_bwd_tuning_sm90(D, False)
    block_t, block_s, columns = tuning["block_t"], tuning["block_s"], 2 * (call.D + call.values)
    begins_q, begins_k = (bounds_of(lengths).tolist() for lengths in (call.T, call.S))
    N, M, heads = begins_q[-1], begins_k[-1], call.H // call.group
    loaded = products = padded = bounds_of_q = 0
    for i, (T, S) in enumerate(zip(call.T, call.S, strict=True)):
        padded += -(-T // block_t) * block_t
        seen = visible(T, S, call.lower, call.upper, call.at_end)
        for s, keys in enumerate(seen.split(block_s, dim=1)):
            if S == 0:
                continue
            bounds_of_q += 2
            met = [t for t, rows in enumerate(keys.split(block_t)) if rows.any()]
            loaded += columns * min(block_s, M - begins_k[i] - s * block_s) * bool(met)
            rows = sum(min(block_t, N - begins_q[i] - t * block_t) for t in met)
            loaded += call.group * (rows * columns + len(met) * (8 * block_t + HUGE_BYTES))
            products += call.group * len(met)
    added = products * 4 * block_t * D
    rows = call.H * N
    prepared = rows * (4 * call.values + ROW_LANES * (4 + 4 * (data.arguments[1] is not None)))
    sought = 2 * call.H * _seeks(begins_q, block_t, ROWS_WARPS)
    sought += heads * (_seeks(begins_k, block_s, MAIN_WARPS) + bounds_of_q)
    sums = call.H * padded * 4 * D
    reads = prepared + sums + heads * (loaded + added) + call.integers.itemsize * sought
    assert counts["global_read_bytes"] == reads
    huge = call.H * padded // block_t * HUGE_BYTES
    written = call.H * padded * 8 + sums + huge + rows * 2 * call.D + heads * M * columns
    assert counts["global_write_bytes"] == written + heads * added
    operands = operands_of_group(D, block_t, block_s)
    assert counts["wgmma_shared_bytes"] == heads * products * GROUPS * 2 * operands
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, Data.of(call).arguments))
    sources = {p for p in mutants.sources_of("attention_varlen_bwd*_sm90*") if "varlen" in p.name}
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("sequences that end in tiles", (330, 70), (200, 129), 128, H=2, group=2, upper=200),
    Call("the same of 64 columns", (600, 70), (200, 129), 64, H=2, group=2, upper=200),
    Call("general", (300, 70), (200, 30), 128, H=1, softcap=4.0),
    Call("one tile each", (40, 64), (128, 20), 128, H=1),
    Call("keys that no query sees", (60, 10), (300, 10), 64, H=1, upper=0),
    Call("wide", (270, 70), (70, 64), 192, H=2, group=2, upper=70),
    Call("wide: one place for q", (400, 9), (70, 20), 256, H=1),
]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("attention_varlen_bwd_sm90")
    assert len(compiled) == 3 * 2 * 2 * len(HEAD_DIMS)
    harness = runtime.load(runtime.ONE)
    harness.configure()
    for call in KERNELS:
        _run(harness, Data.of(replace(call, T=(1,), S=(1,))).arguments)
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of KERNELS reaches {sorted(compiled - ran)}"
