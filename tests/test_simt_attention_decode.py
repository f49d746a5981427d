"""The CUDA decoding kernels on the harness: shapes that reach every branch, all schedules, bytes
moved, bank conflicts, and every synchronisation dropped in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import attention_decode as reference
from fused_lm.reference.layout import empty_heads
from fused_lm.tolerance import check_close
from tests.attention_decode_calls import (
    BF16,
    CALLS,
    F16,
    HEAD_DIMS,
    KERNELS,
    Call,
    data_of,
    formula,
)
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
ROWS = 16
"""Of a block: csrc/kernels/attention_decode_tuning.h."""
MUTANT_SCHEDULES = 4
MAX_GRID_BATCHES = 65535
OF_OTHERS = ("kernels/attention_tile.h", "common/warp.h")
"""Synchronise in store_sums and warps_sum, which these kernels don't call."""


def _run(harness: runtime.Harness, data: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    out, lse = harness.call("attention_decode_fwd", *data)
    return out, lse


def _parameters(calls: Sequence[Call]) -> list[Any]:
    """Of the kernels those wait for `make test-all` whose lines others run: of fp16, and the parts
    of head dims between the narrowest and the widest.
    """
    ends = HEAD_DIMS[0], 128, HEAD_DIMS[-1]
    slow = [
        call for call in KERNELS if call.dtype == F16 or (call.page and call.head_dim not in ends)
    ]
    return [
        pytest.param(call, id=call.why, marks=[pytest.mark.slow] if call in slow else [])
        for call in calls
    ]


@pytest.mark.parametrize("call", _parameters(CALLS))
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    data = data_of(call)
    results = []
    for seed in (0, 6, 11) if harness.name == "race" else (0, 11):
        harness.configure(runtime.Schedule.of_seed(seed))
        results.append(_run(harness, data))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    same, exact = reference.attention_decode_forward(*data), formula(*data)
    for i, name in enumerate(("out", "lse")):
        check_close(results[0][i], same[i], exact[i], name)
    assert results[0][0].stride() == empty_heads(data[0], call.values).stride()


class Block(NamedTuple):
    """What a block works on: rows of a key head, and keys that they see, of whole tiles of which it
    has so many.
    """

    rows: int
    keys: range
    tiles: int


def _tuning(call: Call) -> dict[str, Any]:
    module = runtime.load("race").module
    found: dict[str, Any] = module.attention_decode_tuning(call.head_dim)
    return found


def _splits(call: Call) -> int:
    module = runtime.load("race").module
    sizes = (call.B, call.H, call.group, call.T, call.S, call.D, call.values)
    return int(module.attention_decode_splits(*sizes))


def _blocks(call: Call) -> Iterator[Block]:
    """Of one key head."""
    tuning, splits = _tuning(call), _splits(call)
    size, rows = tuning["block_s"], call.group * call.T
    for given in call.lens:
        length = min(max(given, 0), call.S)
        for first in range(0, rows, ROWS):
            last = min(first + ROWS, rows) - 1
            seen = _seen(call, length, first // call.group, last // call.group)
            begin = seen.start // size
            tiles = -(-seen.stop // size) - begin if seen else 0
            each = max(-(-tiles // splits), tuning["warps"])
            for split in range(splits):
                own = range(tiles)[each * split : each * (split + 1)]
                start, stop = ((begin + tile) * size for tile in (own.start, own.stop))
                keys = range(max(start, seen.start), min(stop, seen.stop))
                yield Block(last + 1 - first, keys if own else range(0), len(own))


def _seen(call: Call, length: int, first: int, last: int) -> range:
    """Keys that some of queries first .. last see."""
    place = length - call.T
    begin = 0 if call.lower is None else max(0, place + first + call.lower)
    end = length if call.upper is None else min(length, place + last + call.upper + 1)
    return range(begin, end) if begin < end else range(0)


def _counts(call: Call) -> dict[str, int]:
    """Global bytes and FLOPs, by the formulas at the top of ``attention_decode_sm80.h``."""
    tuning, splits = _tuning(call), _splits(call)
    heads, threads = call.H // call.group, tuning["threads"]
    integer = call.integers.itemsize
    chunks = call.head_dim // 8
    lanes = 8 if chunks % 8 == 0 else 4
    reads = writes = flops = 0
    for block in _blocks(call):
        works = splits == 1 or block.tiles > 0
        reads += threads * integer
        reads += works * block.rows * call.D * 2
        reads += len(block.keys) * 2 * (call.D + call.values)
        reads += len(block.keys) * lanes * integer * bool(call.page)
        flops += block.tiles * 4 * ROWS * tuning["block_s"] * call.head_dim
        if splits > 1:
            writes += block.rows * (8 + works * 4 * call.values)
            # All threads of its four warps look at the extremes twice, one warp at a split's again.
            reads += block.rows * (8 * (2 * 128 + 32) + works * 4 * call.values)
    rows = call.B * call.group * call.T
    writes += rows * (2 * call.values + 4)
    return {
        "global_read_bytes": heads * reads,
        "global_write_bytes": heads * writes,
        "mma_flops": heads * flops,
    }


COUNTED = [call for call in CALLS if call.size == 1.0]
"""Sums of a part whose scores are far below another's are not read."""


@needs_race
@pytest.mark.parametrize("call", _parameters(COUNTED))
def test_moves_exactly_its_floor(call: Call) -> None:
    """Each key that is seen once for 16 rows, whichever heads they are of; no bank conflict."""
    harness = runtime.load("race")
    with harness.counting() as counts:
        _run(harness, data_of(call))
    assert {name: counts[name] for name in _counts(call)} == _counts(call)
    if call.values == call.head_dim:  # else lanes are out of step, which is taken for conflicts
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@needs_race
@pytest.mark.parametrize("page", [0, 16])
def test_whole_sectors(page: int) -> None:
    """Rows of whole sectors: nothing is fetched or written beside what is asked for, but for the
    length and, in pages, the table: a number or two.
    """
    harness = runtime.load("race")
    call = Call("whole tiles", (256,), 256, 128, T=8, H=2, group=2, page=page)
    with harness.counting() as counts:
        _run(harness, data_of(call))
    beside = counts["global_sectors"] - counts["global_ideal_sectors"]
    assert beside <= (256 if page else 0)


QUICK_MUTANTS = (
    "parts, paged, bf16 32",
    "one part, bf16 128",
    "parts, paged, bf16 256",
    "five queries of three heads, ragged",
    "pages of 7 rows",
)


@needs_race
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_mutant_survives(quick: bool) -> None:
    """Every synchronisation of the kernels, dropped in turn from every call that passes it. Without
    a key nothing is copied, and fp16 runs the lines of bf16.
    """
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in CALLS:
        if quick and call.why not in QUICK_MUTANTS:
            continue
        if call.dtype == BF16 and any(block.tiles for block in _blocks(call)):
            run = partial(_run, hunt.harness, data_of(call))
            hunt.drop_each(call.why, run)
    of_others = {mutants.CSRC / name for name in OF_OTHERS}
    problems = hunt.problems(mutants.sources_of("attention_decode*") - of_others)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


@pytest.mark.slow
@pytest.mark.skipif("simt_plain" not in simt.BACKENDS, reason="in one build")
def test_more_sequences_than_a_grid_has() -> None:
    """Two launches write what is theirs."""
    harness = runtime.load("plain")
    B = MAX_GRID_BATCHES + 2
    q, cache = torch.randn(B, 1, 1, 8).to(BF16), torch.randn(1, 1, 1, 8).to(BF16)
    lens = torch.zeros(B, dtype=torch.int32)
    lens[-1] = 1
    keys = cache.expand(B, 1, 1, 8)
    out, lse = _run(harness, (q, keys, keys, lens, None, None, 0, 1.0, 0.0))
    assert torch.equal(out[-1], cache[0]) and not out[:-1].any()
    assert torch.isneginf(lse[:-1]).all() and torch.isfinite(lse[-1])


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    elements = {"__nv_bfloat16": 2, "__half": 1}
    compiled = {
        f"attention_decode::attention_decode_combine<(DType){n}>" for n in elements.values()
    }
    compiled |= {
        f"attention_decode::attention_decode_sm80<{element}, {head_dim}>"
        for element in elements
        for head_dim in HEAD_DIMS
    }
    golden = sorted((Path(__file__).parent / "golden").glob("cuda-*.json"))[-1]
    places = [place.split(" ", 2) for place in json.loads(golden.read_text())]
    assert {name for _, unit, name in places if unit.startswith("attention_decode")} == compiled
    harness = runtime.load(runtime.ONE)
    harness.configure()
    for call in KERNELS:
        _run(harness, data_of(call))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of KERNELS reaches {sorted(compiled - ran)}"
