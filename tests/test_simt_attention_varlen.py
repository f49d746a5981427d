"""The packed forward for Hopper on the harness: right bits in every schedule, what lies in the next
sequence, bytes moved, and every synchronisation dropped in turn.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import attention_varlen as reference
from fused_lm.tolerance import check_close
from tests.attention_varlen_calls import (
    ANY_BOUNDS,
    BF16,
    CALLS,
    HEAD_DIMS,
    KERNELS,
    LANES,
    POISONED,
    SPARSE,
    TINY,
    Call,
    bounds_of,
    check_neighbours,
    data_of,
    formula,
    sought,
    span_of,
    visible,
)
from tests.golden import compiled_kernels
from tests.gpu import fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
GROUP_ROWS = 64
BLOCKS = 2
"""Multiprocessors of the harness, which the grid has blocks for."""
_RACED = (
    *("plain, bf16 64", "plain, bf16 256", "general, bf16 128"),
    "empty ones on both sides",
)
FEW = [call for call in CALLS if call.why in _RACED]
"""In two schedules on every build."""


def _run(harness: runtime.Harness, data: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    with harness.choosing(hopper=True):
        out, lse = harness.call("attention_varlen_fwd", *data)
    return out, lse


@pytest.mark.parametrize("call", fp16_later(CALLS, KERNELS))
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    data = data_of(call)
    results = []
    for seed in (0, 11) if call in FEW or harness.name == "plain" else (11,):
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(_run(harness, data))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    same, exact = reference.attention_varlen_forward(*data), formula(*data)
    for i, name in enumerate(("out", "lse")):
        check_close(results[0][i], same[i], exact[i], name)
        assert results[0][i].is_contiguous()


@pytest.mark.parametrize("call", POISONED, ids=lambda call: call.why)
def test_neighbours_stay_outside(call: Call, harness: runtime.Harness) -> None:
    check_neighbours(lambda *data: _run(harness, data), call)


def test_a_sequence_has_the_bits_that_it_has_alone(harness: runtime.Harness) -> None:
    """Those of the dense forward too, whose walks these are."""
    call = Call("three", (140, 70, 200), (200, 70, 140), 128, upper=0, at_end=True)
    q, k, v, *rest = data_of(call)
    out, lse = _run(harness, (q, k, v, *rest))
    for i in range(3):
        rows, keys = slice(*span_of(call.T, i)), slice(*span_of(call.S, i))
        bounds = [bounds_of(lengths[i : i + 1]) for lengths in (call.T, call.S)]
        alone = _run(harness, (q[rows], k[keys], v[keys], *bounds, *rest[2:]))
        assert torch.equal(out[rows], alone[0]) and torch.equal(lse[:, rows], alone[1])
        dense = [reference.as_heads(t) for t in (q[rows], k[keys], v[keys])]
        diagonal = call.S[i] - call.T[i]
        with harness.choosing(hopper=True):
            of_dense = harness.call(
                "attention_fwd", *dense, *[None] * 5, diagonal, call.D**-0.5, 0.0, 0.0
            )
        assert torch.equal(out[rows].transpose(0, 1), of_dense[0][0])
        assert torch.equal(lse[:, rows], of_dense[1][0])


@pytest.mark.parametrize(("bounds_q", "bounds_k"), ANY_BOUNDS, ids=str)
def test_any_bounds_are_safe(
    bounds_q: list[int], bounds_k: list[int], harness: runtime.Harness
) -> None:
    """Nothing is read or written outside of the tensors; rows that are a sequence's are right."""
    q, k, v = (torch.randn(rows, 2, 128).to(BF16) for rows in (300, 200, 200))
    bounds = [torch.tensor(b) for b in (bounds_q, bounds_k)]
    out, lse = _run(harness, (q, k, v, *bounds, None, None, False, 0.1, 0.0))
    inside = [b.clamp(0, rows) for b, rows in zip(bounds, (300, 200), strict=True)]
    for i in range(len(bounds_q) - 1):
        rows, keys = (slice(*b[i : i + 2].tolist()) for b in inside)
        alone = [bounds_of((len(t),)) for t in (q[rows], k[keys])]
        data = (q[rows], k[keys], v[keys], *alone, None, None, False, 0.1, 0.0)
        same, exact = reference.attention_varlen_forward(*data), formula(*data)
        check_close(out[rows], same[0], exact[0], "out")
        check_close(lse[:, rows], same[1], exact[1], "lse")


def test_is_for_hopper_alone(harness: runtime.Harness) -> None:
    with pytest.raises(RuntimeError, match=r"kernels for Hopper \(sm_90a\) alone"):
        harness.call("attention_varlen_fwd", *data_of(Call("any", (3,), (4,))))


ERRORS: list[tuple[dict[int, Any], str]] = [
    ({0: torch.zeros(5, 2, 64)}, "take bfloat16 and float16"),
    ({0: torch.zeros(5, 3, 64).half()}, "must divide the heads of q"),
    ({0: torch.zeros(5, 128).half()}, "tensors of three dims"),
    ({0: torch.zeros(5, 2, 32).half()}, "share D"),
    ({1: torch.zeros(7, 2, 64)}, "k must be"),
    ({2: torch.zeros(7, 1, 64).half()}, "rows and the heads of k"),
    ({2: torch.zeros(7, 2, 12).half()}, "multiples of 8 up to 256"),
    ({3: torch.zeros(2)}, "must be int32 or int64"),
    ({4: torch.zeros(2).int()}, "as many for q as for k"),
    ({3: torch.zeros(1).int(), 4: torch.zeros(1).int()}, "must be of a sequence"),
]


@pytest.mark.parametrize(("changed", "text"), ERRORS, ids=lambda value: str(value)[:30])
def test_wrong_pointers_are_refused(
    changed: dict[int, Any], text: str, harness: runtime.Harness
) -> None:
    data = list(data_of(Call("any", (2, 3), (3, 4), dtype=torch.float16)))
    if 0 in changed and changed[0].dtype == torch.float32:
        data[1], data[2] = data[1].float(), data[2].float()
    for place, tensor in changed.items():
        data[place] = tensor
    with pytest.raises(RuntimeError, match=text):
        _run(harness, tuple(data))


def _tuning(call: Call) -> dict[str, Any]:
    module = runtime.load("race").module
    found: dict[str, Any] = module.attention_tuning_sm90(call.head_dim, call.general)
    return found


def _counts(call: Call) -> dict[str, int]:
    """By the formulas at the top of ``attention_varlen_fwd_sm90.h``. Boxes are read as far as the
    tensor goes; products are those of whole tiles, without those that are passed over.
    """
    tuning, D = _tuning(call), call.head_dim
    block_t, block_s = tuning["block_t"], tuning["block_s"]
    begins_q, begins_k = (bounds_of(lengths).tolist() for lengths in (call.T, call.S))
    N, M, integer = begins_q[-1], begins_k[-1], call.integers.itemsize
    tiles = N // block_t + len(call.T)
    reads = products = 0
    for virtual in range(tiles):
        i, searched = sought(begins_q, virtual, block_t)
        reads += integer * (searched + 2 * LANES)
        tile = virtual - begins_q[i] // block_t - i
        if tile * block_t >= call.T[i]:
            continue
        reads += 2 * integer
        seen = visible(call.T[i], call.S[i], call.lower, call.upper, call.at_end)
        rows = seen[tile * block_t : (tile + 1) * block_t]
        met = [s for s, t in enumerate(rows.split(block_s, 1)) if t.any()]
        keys = sum(min(block_s, M - begins_k[i] - s * block_s) for s in met)
        reads += 2 * keys * (call.D + call.values)
        if met:
            reads += 2 * call.D * min(block_t, N - begins_q[i] - tile * block_t)
        products += _products(call, i, tile, met, block_t, block_s)
    taken = 4 * call.H * tiles if call.H * tiles > BLOCKS else 0
    flops = 4 * GROUP_ROWS * block_s * D
    operands = 2 * ((GROUP_ROWS + block_s) * D + block_s * D)
    return {
        "blocks": min(BLOCKS, call.H * tiles),
        "global_read_bytes": call.H * reads + taken,
        "global_write_bytes": call.H * N * (2 * call.values + 4) + taken,
        "wgmma_flops": call.H * products * flops,
        "wgmma_shared_bytes": call.H * products * operands,
    }


def _products(call: Call, i: int, tile: int, met: list[int], block_t: int, block_s: int) -> int:
    """Of a group with a tile of keys: all, but for the last tiles that no row of the group
    reaches, unless it reaches none at all.
    """
    products = block_t // GROUP_ROWS * len(met)
    if block_t <= block_s or call.upper is None:
        return products
    upper = call.upper + (call.S[i] - call.T[i] if call.at_end else 0)
    for last in range(tile * block_t + GROUP_ROWS - 1, (tile + 1) * block_t, GROUP_ROWS):
        hidden = sum(s * block_s > last + upper for s in met)
        products -= max(min(hidden, len(met) - 1), 0)
    return products


MOVED = [call for call in CALLS if sum(call.T) * sum(call.S) and call.H // call.group == call.H]


@needs_race
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=call.why, marks=[] if call in FEW else [pytest.mark.slow])
        for call in MOVED
        if call.size == 1.0 and call.lower != -(2**40) and call.lower != 2**40
    ],
)
def test_moves_exactly_its_floor(call: Call) -> None:
    """And no bank conflict."""
    harness = runtime.load("race")
    with harness.counting(hopper=True) as counts:
        harness.call("attention_varlen_fwd", *data_of(call))
    assert {name: counts[name] for name in _counts(call)} == _counts(call)
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, data_of(call)))
    sources = {p for p in mutants.sources_of("attention_varlen_fwd*_sm90*") if "varlen" in p.name}
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("in turns", (300, 129), (520, 70), 128, H=2, upper=200),
    Call("in turns, three groups", (500, 200), (900, 129), H=1, upper=300),
    Call("out in q's place", (300, 129), (520, 70), 192, H=2),
    Call("in sequence", (300, 129), (520, 70), H=2, softcap=4.0),
    Call("in sequence, out in q's place", (300, 64), (300, 130), 256, H=1, softcap=4.0),
    Call("walks that end before they wait", (129, 60, 256), (100, 60, 10), 128, H=3),
    Call("tiles without a key between others", (500, 129), (60, 90), 128, lower=-300, upper=-90),
    Call("tiles without a key, out in q's place", (500, 64), (40, 9), 256, H=1, upper=-280),
    Call("tiny ones", (1, 3, 0, 2, 64), (2, 3, 1, 0, 9), H=1),
]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("attention_varlen_fwd_sm90")
    assert len(compiled) == 2 * 2 * len(HEAD_DIMS)
    harness = runtime.load(runtime.ONE)
    assert tuple(harness.module.HOPPER_HEAD_DIMS) == HEAD_DIMS
    harness.configure()
    for call in KERNELS:
        _run(harness, data_of(replace(call, T=(1,), S=(1,))))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of KERNELS reaches {sorted(compiled - ran)}"


def test_search_rounds_are_those_of_the_calls() -> None:
    """None, one, two and three of 32 parts each."""
    lengths = [(9,), (9, 9), TINY, SPARSE]
    read = [sought(bounds_of(each).tolist(), 0, 128)[1] for each in lengths]
    assert read[0] == 0 < read[1] == 2 and len(TINY) > LANES and len(SPARSE) > LANES**2
