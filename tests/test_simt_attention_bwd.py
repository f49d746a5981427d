"""The CUDA attention backward on the harness, beyond what ``test_attention.py`` asks of every
backend: all kernels, all schedules, bytes moved, bank conflicts, and every synchronisation dropped.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from build_tools.cubin import short_name
from fused_lm.reference import attention as reference
from fused_lm.tolerance import check_close
from tests.attention_bwd_calls import (
    BIASES,
    CALLS,
    FEATURES,
    JOINT_HEAD_DIM,
    KERNELS,
    Call,
    Data,
)
from tests.attention_calls import (
    BF16,
    GENERAL_TEAM_WARPS,
    HEAD_DIMS,
    MEDIUM,
    RNG,
    TEAM_WARPS,
)
from tests.gpu import a_third, fp16_later
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
SCHEDULES = (0, 11)
"""Who runs in turn, copies as soon as they can be; and both at random."""
MUTANT_SCHEDULES = 4
WARP = 32
LANES_OF_ROW = 4
"""Lanes that hold a row of the bias gradient's product, and read its lse and delta."""
DBIAS_BLOCK, DBIAS_SLICE, DBIAS_THREADS = 64, 64, 128
"""Of csrc/kernels/attention_tuning.h: tiles of the bias gradient, square."""


def _run(harness: runtime.Harness, data: Data) -> Sequence[Tensor]:
    with harness.choosing(max_smem_bytes=data.shared_bytes):
        results: Sequence[Tensor] = harness.call("attention_bwd", *data.arguments)
    return results


@pytest.mark.parametrize("call", fp16_later(CALLS, KERNELS))
def test_every_schedule_gives_the_right_bits(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    results = {}
    for seed in SCHEDULES[-1:] if call in KERNELS and harness.name == "race" else SCHEDULES:
        harness.configure(runtime.Schedule.of_seed(seed))
        results[seed] = _run(harness, data)
    first = results[SCHEDULES[-1]]
    for i, name in enumerate(("dq", "dk", "dv", "dbias")):
        check_close(first[i], data.same[i], data.exact[i], name)
        assert first[i].stride() == data.same[i].stride()
    for seed, other in results.items():
        equal = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert equal, f"schedules {SCHEDULES[-1]} and {seed} differ"


def _walks(call: Call, own: int, block_own: int, block_other: int) -> list[tuple[int, list[int]]]:
    """Per tile along dim ``own`` of [T, S] its length, and those of the tiles across it in which
    anything is visible.
    """
    band = reference.visible(call.T, call.S, call.lower, call.upper, torch.device("cpu"))
    visible = torch.ones(call.T, call.S, dtype=torch.bool) if band is None else band
    return [
        (
            tile.shape[own],
            [part.shape[1 - own] for part in tile.split(block_other, 1 - own) if part.any()],
        )
        for tile in visible.split(block_own, own)
    ]


def _score_reads(call: Call, queries: int, keys: int, warps: int, threads: int) -> int:
    """Of one tile: mask and bias where a query and a key are, a key's mask in each of its warps."""
    bias = call.bias_dtype.itemsize if call.bias else 0
    reads = queries * keys * (bool(call.mask) + bias) + warps * keys * call.key_mask
    return reads + RNG.nbytes * threads * (call.dropout_p > 0)


def _delta(call: Call) -> Counter[str]:
    rows = call.B * call.H * call.T
    reads = rows * (4 * call.values + 4 + 4 * call.dlse)
    return Counter(global_read_bytes=reads, global_write_bytes=8 * rows)


def _tuning(call: Call, makes: str) -> tuple[int, int, int]:
    """Of the launch that makes "dk", "dv", "dq", or "dkdv"."""
    module = runtime.load("race").module
    warps = call.team_warps(makes)
    general = call.general or call.head_dim > JOINT_HEAD_DIM
    if warps:
        found = module.attention_backward_teams_tuning(call.head_dim, makes, warps)
    elif makes == "dq":
        found = module.attention_dq_tuning(call.head_dim, general)
    else:
        found = module.attention_dkdv_tuning(call.head_dim, general)
    return found["block_own"], found["block_other"], found["threads"]


def _dkdv(call: Call, makes: str) -> Counter[str]:
    """A key tile reads its k, its v for dk, and q, dout and two numbers of the queries that see it,
    in every head of its group.
    """
    makes_dk, makes_dv = "dk" in makes, "dv" in makes
    block_s, block_t, threads = _tuning(call, makes)
    lookers = 2 if call.team_warps(makes) else 1  # warps that look at a key's mask
    reads = flops = 0
    for keys, tiles in _walks(call, 1, block_s, block_t):
        reads += 2 * keys * (call.D + call.values * makes_dk) * bool(tiles)
        for queries in tiles:
            once = queries * (2 * call.D + 2 * call.values + 8)
            once += _score_reads(call, queries, keys, lookers, threads)
            reads += call.group * once
        products = 1 + 2 * makes_dk + makes_dv
        flops += call.group * len(tiles) * 2 * products * block_t * block_s * call.head_dim
    writes = 2 * call.S * (call.D * makes_dk + call.values * makes_dv)
    return _times(call.B * call.H // call.group, reads, writes, flops)


def _dq(call: Call) -> Counter[str]:
    """A query tile reads q and dout, two numbers per row, and k and v of the keys that it sees."""
    block_t, block_s, threads = _tuning(call, "dq")
    lookers = threads // WARP // (2 if call.team_warps("dq") else 1)
    reads = flops = 0
    for queries, tiles in _walks(call, 0, block_t, block_s):
        reads += queries * (2 * (call.D + call.values) * bool(tiles) + 8)
        for keys in tiles:
            reads += 2 * keys * (call.D + call.values)
            reads += _score_reads(call, queries, keys, lookers, threads)
        flops += len(tiles) * 6 * block_t * block_s * call.head_dim
    return _times(call.B * call.H, reads, 2 * call.T * call.D, flops)


def _dbias(call: Call) -> Counter[str]:
    """A visible tile reads q, k, dout, v, and two numbers per row for each lane that holds it."""
    reads = flops = 0
    for queries, tiles in _walks(call, 0, DBIAS_BLOCK, DBIAS_BLOCK):
        for keys in tiles:
            reads += 2 * (queries + keys) * (call.D + call.values) + 8 * LANES_OF_ROW * queries
            reads += _score_reads(call, queries, keys, DBIAS_THREADS // WARP, DBIAS_THREADS)
            for columns in (call.D, call.values):
                flops += 2 * DBIAS_BLOCK**2 * (-(-columns // DBIAS_SLICE) * DBIAS_SLICE)
    sizes = {"B": call.B, "H": call.H, "T": call.T, "S": call.S, "1": 1}
    writes = math.prod(sizes[dim] for dim in call.bias) * call.bias_dtype.itemsize
    return _times(call.B * call.H, reads, 0, flops) + Counter(global_write_bytes=writes)


def _times(heads: int, reads: int, writes: int, flops: int) -> Counter[str]:
    names = ("global_read_bytes", "global_write_bytes", "mma_flops")
    return Counter({n: heads * c for n, c in zip(names, (reads, writes, flops), strict=True)})


def _counts(call: Call) -> dict[str, int]:
    """Global bytes and FLOPs of all launches, by the formulas at the top of the kernels."""
    if call.B * call.T * call.S == 0:
        return dict.fromkeys(("global_read_bytes", "global_write_bytes", "mma_flops"), 0)
    total = _delta(call) + _dq(call)
    for makes in ("dkdv",) if call.head_dim <= JOINT_HEAD_DIM else ("dv", "dk"):
        total += _dkdv(call, makes)
    if call.bias and call.needs_dbias:
        total += _dbias(call)
    return dict(total)


COUNTED = [*BIASES[::5], *(call for call in CALLS if call.dtype == BF16 and call.B == 1)]


@needs_race
@pytest.mark.parametrize("call", a_third(COUNTED))
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas above, without a bank conflict, and whole sectors."""
    harness = runtime.load("race")
    with harness.counting() as counts:
        _run(harness, Data.of(call))
    expected = _counts(call)
    assert {name: counts[name] for name in expected} == expected
    if _lanes_stay_in_step(call):
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]
    if _rows_are_whole_sectors(call):
        assert counts["global_sectors"] == counts["global_ideal_sectors"]


def _lanes_stay_in_step(call: Call) -> bool:
    """Whether the lanes that store a row store equally many chunks, or one at most: the harness
    tells the turns of a loop apart by how often a lane has come by.
    """
    lanes = 8 if call.head_dim % 64 == 0 else 4
    chunks = (call.D // 8, call.values // 8)
    return all(count <= lanes or count % lanes == 0 for count in chunks)


def _rows_are_whole_sectors(call: Call) -> bool:
    """Whether no rows share a sector: those of lse and delta are T numbers."""
    numbers = call.T % 8 == 0 or call.T == 1 or call.B * call.H == 1
    scores = call.mask or call.key_mask or call.bias
    return bool(numbers and call.D % 16 == call.values % 16 == 0 and not scores)


HUNTED = [
    Call("two tiles each way, of several heads", 70, 150, 128, group=2),
    Call("in parts, bias of every score", 70, 70, 192, H=1, bias="11TS"),
    Call("wide teams, two tiles each way, of several heads", 70, 150, 192, group=2),
    Call("large joint teams", 70, 70, 128, group=2, **MEDIUM),
    Call("few wide teams with features", 70, 70, 256, H=1, **FEATURES, **MEDIUM),
    Call("bias of every score, whole chunks", 70, 72, 8, H=1, bias="11TS"),
    Call("bias of keys", 70, 70, 8, H=1, bias="111S"),
    Call("bias of queries", 70, 70, 8, H=1, bias="11T1"),
    Call("one bias", 70, 70, 8, H=1, bias="1111"),
    Call("general", 70, 70, H=1, **FEATURES),
]
"""Two tiles and more, since the last one has none behind it to be kept apart from."""
OF_OTHERS = {mutants.CSRC / "common/warp.h"}
"""Its barrier is of rows that several warps share, as the norms' are: no warp here meets another's
by it.
"""


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from every call that passes it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES)
    for call in HUNTED:
        hunt.drop_each(call.why, partial(_run, hunt.harness, Data.of(call)))
    kernels = ("attention_bwd_*sm80*", "attention_bwd_delta*", "attention_dbias*")
    sources = set.union(*map(mutants.sources_of, kernels))
    problems = hunt.problems(sources - OF_OTHERS)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name."""
    golden = sorted((Path(__file__).parent / "golden").glob("cuda-*.json"))[-1]
    compiled = {
        place.split(" ", 2)[2]
        for place in json.loads(golden.read_text())
        if place.split(" ")[1].startswith(("attention_bwd", "attention_dbias"))
        and "_sm90_" not in place.split(" ")[1]
    }
    harness = runtime.load(runtime.ONE)
    assert harness.module.MAX_JOINT_HEAD_DIM == JOINT_HEAD_DIM
    harness.configure()
    for call in KERNELS:
        _run(harness, Data.of(replace(call, T=1, S=1)))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    missing = (compiled | _instantiations()) - ran
    assert not missing, f"no call of KERNELS reaches {sorted(missing)}"


def _instantiations() -> set[str]:
    """With teams and without; without, above the joint head dims, general ones alone."""
    found = set()
    passes = {"dkdv": 0, "dv": 1, "dk": 2}
    teams = {"dk": 0, "dv": 1, "dq": 2}
    for element, general in itertools.product(("__nv_bfloat16", "__half"), ("false", "true")):
        found.add(f"attention_bwd_delta<{element}>")
        found.add(f"attention_dbias::attention_dbias_sm80<{element}>")
        keys = "attention_dkdv::attention_bwd_dkdv_sm80"
        for dim in HEAD_DIMS:
            joint = dim <= JOINT_HEAD_DIM
            if not joint and general == "false":
                continue
            found.add(f"attention_dq::attention_bwd_dq_sm80<{element}, {dim}, {general}>")
            for makes in ("dkdv",) if joint else ("dv", "dk"):
                part = f"(attention_dkdv::Part){passes[makes]}"
                found.add(f"{keys}<{element}, {dim}, {general}, {part}, 0>")
        table = GENERAL_TEAM_WARPS if general == "true" else TEAM_WARPS
        for (makes, dim), blocks in table.items():
            for warps in set(blocks) if makes != "out" else ():
                if makes == "dkdv":
                    part = "(attention_dkdv::Part)0"
                    found.add(f"{keys}<{element}, {dim}, {general}, {part}, {warps}>")
                else:
                    found.add(
                        f"attention_bwd::attention_bwd_teams_sm80<{element}, {dim}, "
                        f"(TeamPass){teams[makes]}, {warps}, {general}>"
                    )
    return found
