"""The CUDA attention on the harness, beyond what ``test_attention.py`` asks of every backend: all
kernels, all schedules, bytes moved, bank conflicts, and every synchronisation dropped in turn.
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
from fused_lm.reference import attention as reference
from fused_lm.reference.layout import empty_heads
from fused_lm.tolerance import check_close
from tests.attention_calls import (
    BF16,
    CALLS,
    F32,
    GENERAL_TEAM_WARPS,
    HEAD_DIMS,
    KERNELS,
    RNG,
    TEAM_WARPS,
    Call,
    data_of,
    in_fp64,
)
from tests.golden import compiled_kernels
from tests.gpu import a_third, fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 4
WARP = 32
MAX_GRID_BATCHES = 65535
LARGE = 500_000
"""B H T S times head dim, from which on a call runs in fewer schedules."""


def _run(
    harness: runtime.Harness, data: tuple[Any, ...], shared_bytes: int = runtime.LARGE_SHARED
) -> tuple[Tensor, Tensor]:
    with harness.choosing(max_smem_bytes=shared_bytes):
        out, lse = harness.call("attention_fwd", *data)
    return out, lse


@pytest.mark.parametrize("call", fp16_later(CALLS, KERNELS))
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    once = call in KERNELS and harness.name == "race"
    _check(harness, call, (11,) if once else (11, 0))


@pytest.mark.slow
@pytest.mark.skipif(runtime.sanitized(), reason="they look at addresses, in any schedule")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_more_schedules_give_the_same_bits(call: Call, harness: runtime.Harness) -> None:
    work = call.B * call.H * call.T * call.S * call.head_dim
    _check(harness, call, (11, 0, 6) if work > LARGE else (11, 0, 3, 5, 6))


def _check(harness: runtime.Harness, call: Call, seeds: Sequence[int]) -> None:
    data = data_of(call)
    results = {}
    for seed in seeds:
        harness.configure(runtime.Schedule.of_seed(seed))
        results[seed] = _run(harness, data, call.shared_bytes)
    first = results[seeds[0]]
    same, exact = reference.attention_forward(*data), in_fp64(data)
    for i, name in enumerate(("out", "lse")):
        check_close(first[i], same[i], exact[i], name)
    for seed, other in results.items():
        equal = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert equal, f"schedules {seeds[0]} and {seed} differ"
    assert first[0].stride() == empty_heads(data[0], call.values).stride()


def _tuning(call: Call) -> dict[str, Any]:
    found: dict[str, Any] = runtime.load("race").module.attention_tuning(
        call.head_dim, call.general, call.team_warps("out")
    )
    return found


def _tiles(call: Call) -> list[tuple[int, list[int]]]:
    """Per query tile its rows, and how many keys each tile has that any of these rows sees."""
    tuning = _tuning(call)
    block_t, block_s = tuning["block_t"], tuning["block_s"]
    band = reference.visible(call.T, call.S, call.lower, call.upper, torch.device("cpu"))
    visible = torch.ones(call.T, call.S, dtype=torch.bool) if band is None else band
    return [
        (len(rows), [tile.shape[1] for tile in rows.split(block_s, dim=1) if tile.any()])
        for rows in visible.split(block_t)
        if call.T
    ]


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from every call that passes it. One
    tile of keys has none behind it to be kept apart from, and fp16 runs the lines of bf16.
    """
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in CALLS:
        if call.dtype == BF16 and any(len(keys) > 1 for _, keys in _tiles(call)):
            run = partial(_run, hunt.harness, data_of(call), call.shared_bytes)
            hunt.drop_each(call.why, run)
    # Its barrier is of rows that several warps share: no warp here meets another's.
    sources = mutants.sources_of("attention_fwd_sm80*.cu") - {mutants.CSRC / "common/warp.h"}
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


def _counts(call: Call) -> dict[str, int]:
    """Global bytes and FLOPs, by the formulas at the top of ``attention_fwd_sm80.h``."""
    tuning = _tuning(call)
    block_t, block_s = tuning["block_t"], tuning["block_s"]
    reads = flops = 0
    for rows, keys in _tiles(call):
        seen = sum(keys)
        reads += 2 * rows * call.D * (seen > 0) + 2 * seen * (call.D + call.values)
        reads += rows * seen * (bool(call.mask) + call.bias_dtype.itemsize * bool(call.bias))
        looks = tuning["threads"] // WARP // (2 if call.team_warps("out") else 1)
        reads += looks * seen * call.key_mask
        reads += RNG.nbytes * tuning["threads"] * len(keys) * (call.dropout_p > 0)
        flops += 4 * block_t * block_s * call.head_dim * len(keys)
    heads = call.B * call.H
    writes = call.T * (2 * call.values + 4)
    return {
        "global_read_bytes": heads * reads,
        "global_write_bytes": heads * writes,
        "mma_flops": heads * flops,
    }


@needs_race
@pytest.mark.parametrize("call", a_third(CALLS))
def test_moves_exactly_its_floor(call: Call) -> None:
    """q once, the keys that a query tile sees, no bank conflict, whole sectors."""
    harness = runtime.load("race")
    with harness.counting() as counts:
        _run(harness, data_of(call), call.shared_bytes)
    assert {name: counts[name] for name in _counts(call)} == _counts(call)
    if _lanes_stay_in_step(call):
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]
    if _rows_are_whole_sectors(call):
        assert counts["global_sectors"] == counts["global_ideal_sectors"]


def _lanes_stay_in_step(call: Call) -> bool:
    """Whether the lanes that store a row of out store equally many chunks, or one at most: the
    harness tells the turns of a loop apart by how often a lane has come by.
    """
    lanes = 8 if call.head_dim % 64 == 0 else 4
    chunks = call.values // 8
    return chunks <= lanes or chunks % lanes == 0


def _rows_are_whole_sectors(call: Call) -> bool:
    """Whether no rows share a sector: those of lse are T numbers."""
    lse = call.T % 8 == 0 or call.T == 1 or call.B * call.H == 1
    scores = call.mask or call.key_mask or call.bias
    return bool(lse and call.D % 16 == call.values % 16 == 0 and not scores)


SCORES: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"bias": "1HTS", "bias_dtype": F32},
    {"bias": "1HTS"},
    {"mask": "1HTS"},
    {"bias": "1HTS", "mask": "1HTS"},
]


@needs_race
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scores", SCORES, ids=lambda scores: " ".join(scores))
def test_sectors(head_dim: int, scores: dict[str, Any]) -> None:
    """Nothing is fetched beside whole rows. Of a bias a quad of lanes takes 8 elements of a row: a
    sector each, which they fill in fp32 alone; of a mask 32 bytes, or 16 at a warp's end.
    """
    call = Call("whole sectors", 40, 96, head_dim, **scores)
    harness = runtime.load("race")
    with harness.counting() as counts:
        _run(harness, data_of(call))
    floor = _counts(replace(call, mask="", bias=""))
    rows = (floor["global_read_bytes"] + floor["global_write_bytes"]) // 32
    pieces = call.S // 8 * bool(call.bias) + _mask_sectors(call) * bool(call.mask)
    assert counts["global_sectors"] == rows + call.H * call.T * pieces


def _mask_sectors(call: Call) -> int:
    """Of a row, which begins with one."""
    block = _tuning(call)["block_s"]
    own = block // (2 if call.team_warps("out") else 1)
    firsts = [
        (first + part, min(32, own - part))
        for first in range(0, -(-call.S // block) * block, own)
        for part in range(0, own, 32)
    ]
    ends = [(first, min(first + keys, call.S)) for first, keys in firsts if first < call.S]
    return sum((end - 1) // 32 - first // 32 + 1 for first, end in ends)


@pytest.mark.slow
@pytest.mark.skipif("simt_plain" not in simt.BACKENDS, reason="in one build")
def test_more_batches_than_a_grid_has() -> None:
    """Two launches write what is theirs. Without keys: products of so many blocks take minutes."""
    harness = runtime.load("plain")
    B = MAX_GRID_BATCHES + 2
    out, lse = _run(harness, data_of(Call("many batches", 1, 0, 8, B=B, H=1)))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    compiled = compiled_kernels("attention_fwd_sm80")
    compiled |= {
        f"attention_fwd::attention_fwd_sm80<{element}, {head_dim}, {general}>"
        for element in ("__nv_bfloat16", "__half")
        for head_dim in HEAD_DIMS
        for general in ("false", "true")
    }
    compiled |= {
        f"attention_fwd::attention_fwd_teams_sm80<{element}, {head_dim}, {warps}, {general}>"
        for element in ("__nv_bfloat16", "__half")
        for general, table in (("false", TEAM_WARPS), ("true", GENERAL_TEAM_WARPS))
        for (makes, head_dim), of_a_block in table.items()
        for warps in of_a_block
        if makes == "out"
    }
    harness = runtime.load(runtime.ONE)
    assert tuple(harness.module.HEAD_DIMS) == HEAD_DIMS
    harness.configure()
    for call in KERNELS:
        _run(harness, data_of(call), call.shared_bytes)
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert not compiled - ran, f"no call of KERNELS reaches {sorted(compiled - ran)}"
