"""The harness is proven on kernels that make one mistake each: the right build reports it with the
right line, and none reports anything where there is no mistake.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.simt import build, report, runtime
from tests.simt.planted import sanitized
from tests.simt.planted.marks import Mark, marks
from tests.simt.runtime import ORDERS, TIMINGS, Schedule

PROBLEM = build.unavailable()
pytestmark = pytest.mark.skipif(
    PROBLEM is not None or runtime.sanitized(), reason=str(PROBLEM or "the sanitizers are here")
)

MARKS = marks()
HERE_BUILDS = ("plain", "race")
"""Those that run in this process."""
SMALL = 100_000
"""Accesses that no planted kernel makes without waiting for anybody, unless it spins."""
SCHEDULES = [
    *(
        Schedule(order, timing, most_accesses=SMALL)
        for order, timing in itertools.product(ORDERS[:3], TIMINGS[:2])
    ),
    *(Schedule("random", "random", seed, most_accesses=SMALL) for seed in range(1, 7)),
    Schedule("round_robin", "random", 8, most_accesses=SMALL),
]
COUNTED = Schedule(count_transactions=True)


@pytest.fixture
def race() -> Iterator[runtime.Harness]:
    harness = runtime.load("race")
    yield harness
    harness.configure()


@functools.cache
def _sanitized() -> dict[str, Any]:
    return sanitized.run(SCHEDULES[::4])


def _kernels() -> list[str]:
    return sorted({mark.kernel for mark in MARKS})


def _report(harness: runtime.Harness, kernel: str, with_bug: bool = True) -> str:
    """What the harness says, empty: nothing."""
    try:
        harness.module.run_planted(kernel, with_bug)
    except RuntimeError as error:
        return str(error)
    return ""


def _id(mark: Mark) -> str:
    return f"{mark.kernel}-{mark.line}-{mark.build}"


# Every mistake is reported.


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(m, id=_id(m), marks=[pytest.mark.slow] * (m.build == "plain"))
        for m in MARKS
        if m.build in HERE_BUILDS
    ],
)
def test_reports_the_mistake(mark: Mark) -> None:
    harness = runtime.load(mark.build)
    harness.configure(most_accesses=SMALL)
    report.PLANTED.add(f"{mark.build} {mark.kernel}")
    text = _report(harness, mark.kernel)
    assert text, "nothing was reported"
    assert mark.mismatch(text) is None, f"{mark.mismatch(text)}:\n{text}"
    assert not _report(harness, mark.kernel, with_bug=False), "something was left behind"


@pytest.mark.slow
def test_sanitizers_report_the_mistakes() -> None:
    reports = _sanitized()["wrong"]
    problems = []
    for mark in MARKS:
        if mark.build != "asan":
            continue
        report.PLANTED.add(f"asan {mark.kernel}")
        text = reports[mark.kernel]
        if not text or mark.mismatch(text) is not None:
            problems.append(f"{mark.kernel}: {mark.mismatch(text)}\n{text[:1500]}")
    assert not problems, "\n\n".join(problems)


BY_LUCK = {
    (kernel, build)
    for kernel in (
        "phase_that_is_over_too_soon",  # if the second phase ends before a waiter of the first ran
        "copy_arrives_after_the_end",  # where a copy is late
    )
    for build in HERE_BUILDS
}
"""Wrong only in some schedules."""


_OTHER_BLOCK = (
    "a block (reads|writes) global memory that another block of the launch (reads|writes)"
)
ELSEWISE = {
    "block_adds_to_what_another_stores": "a block uses global memory that another block .* adds to",
    "block_reads_its_neighbour": _OTHER_BLOCK,
    "block_writes_what_another_reads": _OTHER_BLOCK,
    "ballot_of_two_masks": "deadlock .*warp vote",
    "copy_to_behind_shared_memory": "is not in dynamic shared memory",
    "loaded_over_while_read": "(two phases ended|deadlock|not ordered before it)",
    "multicast_over_what_the_peer_reads": "two phases ended before the thread saw the first",
    "multicast_not_expected": "(under way|ended with -1024 bytes|deadlock|uninitialised)",
    "operand_overwritten_in_flight": "read of data whose write is not ordered before it",
    "operands_not_waited_for": "write to data whose read is not ordered before it",
    "peer_read_before_it_writes": "write to data whose read is not ordered before it",
    "phase_of_copies_not_waited_for": r"\d+ of 64 arrivals in a phase of the mbarrier",
    "second_load_not_expected": "(two phases|deadlock|block ended with|not ordered|uninitialised)",
    "store_before_all_have_written": "write to data whose read is not ordered before it",
}
"""What else may be said, in schedules that meet another side of the mistake."""


@pytest.mark.parametrize(
    ("kernel", "name"),
    sorted({(m.kernel, m.build) for m in MARKS if m.build in HERE_BUILDS} - BY_LUCK),
)
def test_reports_the_mistake_in_every_schedule(kernel: str, name: str) -> None:
    """Happens-before doesn't depend on luck: whichever thread comes first, it is said; and what
    ended in the middle leaves nothing behind.
    """
    patterns = [mark.pattern for mark in MARKS if (mark.kernel, mark.build) == (kernel, name)]
    patterns += [ELSEWISE[kernel]] if kernel in ELSEWISE else []
    harness = runtime.load(name)
    for schedule in SCHEDULES:
        harness.configure(schedule)
        text = _report(harness, kernel)
        assert any(re.search(p, text, re.DOTALL) for p in patterns), f"{schedule}:\n{text}"
        assert not _report(harness, "votes_of_the_block", with_bug=False)
    harness.configure()


def test_there_are_mistakes_of_every_kind() -> None:
    known = set(runtime.load(runtime.ONE).module.planted_kernels())
    costs = {name for name in known if name.startswith(("count_", "fragments_"))}
    assert known - costs == set(_kernels())
    assert len(known - costs) >= 138
    for name in build.BUILDS:
        assert sum(mark.build == name for mark in MARKS) >= 20, name


# Nothing is reported where there is no mistake.


@functools.cache
def _right_results(name: str) -> list[dict[str, list[float]]]:
    if name == "asan":
        return _sanitized()["right"]
    harness = runtime.load(name)
    found = []
    for schedule in SCHEDULES:
        harness.configure(schedule)
        harness.schedules.add(schedule)
        kernels = harness.module.planted_kernels()
        found.append({kernel: harness.module.run_planted(kernel, False) for kernel in kernels})
    harness.configure()
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "asan")) for n in build.BUILDS]
)
def test_right_kernels_pass_and_repeat_bitwise(name: str) -> None:
    first = _right_results(runtime.ONE)[0]
    for results in _right_results(name):
        assert results == first
    unwritten = [k for k, values in first.items() if any(math.isnan(x) for x in values)]
    assert not unwritten


# Counters, by hand.

WARP_ROW = 128 // 32
"""Sectors of 32 floats."""


def _counts(race: runtime.Harness, kernel: str, other: bool, **choices: Any) -> dict[str, int]:
    with race.counting(**choices) as found:
        race.module.run_planted(kernel, other)
    return found


@pytest.mark.parametrize(
    ("kernel", "other", "sectors", "ideal"),
    [
        # 128 threads read and write 4 bytes each; apart, each word lies in a sector of its own
        ("count_words", False, 4 * WARP_ROW * 2, 4 * WARP_ROW * 2),
        ("count_words", True, 128 + 4 * WARP_ROW, 4 * WARP_ROW * 2),
        # 64 lanes of 16 bytes: 32 sectors; with holes only half of each sector is used
        ("count_vectors", False, 32 + 32, 64),
        ("count_vectors", True, 64 + 32, 64),
        ("count_shifted_row", False, 4 + 4, 8),
        ("count_shifted_row", True, 5 + 4, 8),
        ("count_few_words", False, 1 + 4, 1 + 4),
        ("count_few_words", True, 2 + 4, 1 + 4),
        # 32 lanes copy 16 or 8 bytes, and write 4
        ("count_copies", False, 16 + 4, 20),
        ("count_copies", True, 16 + 4, 8 + 4),
    ],
)
def test_counts_sectors(
    race: runtime.Harness, kernel: str, other: bool, sectors: int, ideal: int
) -> None:
    found = _counts(race, kernel, other)
    assert (found["global_sectors"], found["global_ideal_sectors"]) == (sectors, ideal)


@pytest.mark.parametrize(
    ("kernel", "other", "read", "written"),
    [
        ("count_words", False, 4 * 128, 4 * 128),
        ("count_vectors", True, 16 * 64, 16 * 64),
        ("count_copies", False, 16 * 32, 4 * 32),
        ("count_atomics", False, 2 * 4 * 32, 2 * 4 * 32),
        ("count_atomics", True, 3 * 4 * 32, 3 * 4 * 32),
        ("count_loose_words", False, 4 * 32, 4 * 32),
        ("count_loose_words", True, 4 * 32, 4 * 32),
        ("count_copies", True, 8 * 32, 4 * 32),
    ],
)
def test_counts_bytes(
    race: runtime.Harness, kernel: str, other: bool, read: int, written: int
) -> None:
    found = _counts(race, kernel, other)
    assert (found["global_read_bytes"], found["global_write_bytes"]) == (read, written)


@pytest.mark.parametrize(
    ("kernel", "other", "wavefronts", "ideal"),
    [
        # 32 rows stored, 32 columns loaded: one wavefront each, or 32 for a column
        ("count_transposed_tile", False, 32 + 32, 64),
        ("count_transposed_tile", True, 32 + 32 * 32, 64),
        # two rows stored; then one word for all, or 32 words in 16 banks
        ("count_broadcast", False, 2 + 1, 3),
        ("count_broadcast", True, 2 + 2, 3),
        # eight rows stored; 512 bytes loaded by quarters of a warp, or 8 lanes over 256 bytes
        ("count_shared_vectors", False, 8 + 4, 12),
        ("count_shared_vectors", True, 8 + 8, 12),
        # 32 rows stored; 4 matrices loaded and stored, one wavefront each or 8
        ("count_ldmatrix", False, 32 + 4 + 4, 40),
        ("count_ldmatrix", True, 32 + 32 + 32, 40),
    ],
)
def test_counts_wavefronts(
    race: runtime.Harness, kernel: str, other: bool, wavefronts: int, ideal: int
) -> None:
    found = _counts(race, kernel, other)
    assert (found["shared_wavefronts"], found["shared_ideal_wavefronts"]) == (wavefronts, ideal)


@pytest.mark.parametrize(("other", "products"), [(False, 3), (True, 6)])
def test_counts_products(race: runtime.Harness, other: bool, products: int) -> None:
    warps = 2
    assert _counts(race, "count_mma", other)["mma_flops"] == warps * products * 2 * 16 * 8 * 16


@pytest.mark.parametrize("other", [False, True])
def test_counts_once_in_every_schedule(race: runtime.Harness, other: bool) -> None:
    """2 warps read 2 rows, 2 read 3, all write one; whoever meets whom in between."""
    for schedule in SCHEDULES:
        choices = {"order": schedule.order, "timing": schedule.timing, "seed": schedule.seed}
        found = _counts(race, "count_in_parts", other, **choices)
        assert found["global_sectors"] == (2 * 2 + 2 * 3 + 4) * WARP_ROW, schedule


# Replays, mutants, reports.


@pytest.mark.parametrize("kernel", ["read_before_barrier", "producer_ignores_empty"])
def test_a_seed_replays(race: runtime.Harness, kernel: str) -> None:
    reports = {}
    for seed in range(1, 9):
        race.configure(order="random", timing="random", seed=seed)
        reports[seed] = _report(race, kernel)
        assert _report(race, kernel) == reports[seed]
    assert len(set(reports.values())) > 1


def _sites(harness: runtime.Harness, kernel: str) -> list[tuple[str, int, str]]:
    harness.configure()
    harness.module.forget_sites()
    harness.module.run_planted(kernel, False)
    return harness.module.sites()


def test_lists_every_site(race: runtime.Harness) -> None:
    path = build.HERE / "planted/copies.cu"
    lines = path.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if "void copy_read_by_others(" in line)
    end = next(i for i, line in enumerate(lines) if "PLANT(copy_read_by_others" in line)
    words = {
        "cp_async_commit": "cp.async commit",
        "cp_async_wait": "cp.async wait",
        "__syncthreads": "barrier sync",
    }
    expected = [
        (str(path), number + 1, kind)
        for number in range(begin, end)
        for word, kind in words.items()
        if word in lines[number]
    ]
    assert len(expected) == 3
    assert _sites(race, "copy_read_by_others") == expected


NO_ORDER = {"counter_without_atomics", "atomic_on_what_nobody_wrote", "atomic_not_aligned"}
"""Atomics conflict with nothing here, so that nothing tells whether barriers are between them."""


@pytest.mark.parametrize("kernel", sorted(set(_kernels()) - NO_ORDER))
def test_no_dropped_synchronisation_survives(race: runtime.Harness, kernel: str) -> None:
    """The same kernels, right but for one place that was switched off in the run."""
    survivors = []
    for file, line, kind in _sites(race, kernel):
        race.configure(dropped=(file, line))
        report.MUTANTS.add(f"race {file}:{line}")
        if not _report(race, kernel, with_bug=False):
            survivors.append(f"{kind} at {file}:{line}")
    assert not survivors


def test_drops_one_place_only(race: runtime.Harness) -> None:
    (file, commit, _), (_, wait, _), (_, barrier, _) = _sites(race, "copy_read_by_others")
    race.configure(dropped=(file, barrier))
    read = barrier + 1
    assert f"by thread 0 at copies.cu:{read} " in _report(race, "copy_read_by_others", False)
    race.configure(dropped=(file, wait))
    report_of_wait = _report(race, "copy_read_by_others", False)
    assert f"by thread 31 at copies.cu:{read};" in report_of_wait
    assert "the other: cp.async of thread 0 at" in report_of_wait
    race.configure(dropped=(file, 1))
    assert not _report(race, "copy_read_by_others", False)
    race.configure(dropped=("elsewhere.cu", commit))
    assert not _report(race, "copy_read_by_others", False)


def test_deadlock_names_everybody(race: runtime.Harness) -> None:
    race.configure()
    (mark,) = [m for m in MARKS if m.kernel == "arrival_missing" and m.build == "race"]
    lines = _report(race, "arrival_missing").splitlines()
    assert lines[0] == "deadlock in block (0, 0, 0):"
    wait = (
        rf"mbarrier wait at mbarriers\.cu:{mark.line}: smem\+0x800 parity 0 "
        r"\(phase 0, 1 of 64 arrivals missing; init at mbarriers\.cu:\d+\)"
    )
    assert re.fullmatch(rf"  warp 0 lanes ffffffff: {wait}", lines[1])
    assert re.fullmatch(rf"  warp 1 lanes ffffffff: {wait}", lines[2])
    (mark,) = [m for m in MARKS if m.kernel == "barrier_not_reached" and m.build == "race"]
    assert _report(race, "barrier_not_reached").splitlines() == [
        "deadlock in block (0, 0, 0):",
        f"  warp 0 lanes ffffffff: barrier 0 at barriers.cu:{mark.line} "
        "(32 of 64 threads have arrived)",
        "  warp 1 lanes ffffffff: has ended",
    ]


# The two halves of every wrapper.

_FUNCTION = re.compile(r"(?:^|\n)((?:template <[^>]*>\n)?)([^\n;#/{}()]*?)\b(\w+)\(([^{;]*)\) ?\{")
_HOST_ONLY = re.compile(r",?\s*SIMT_HERE")
_MACROS = re.compile(r"(?m)^#(?:.*\\\n)*.*$|^ *FUSED_LM_\w+\(.*\)$")
_OF_ONE_SIDE = {"tensor_map_type", "tensor_map_swizzle", "tensor_map_encoder", "wgmma_shape"}
_QUALIFIERS = re.compile(r"__device__|__forceinline__|\binline\b|\b__restrict__\b")


def _functions(path: Any) -> set[tuple[str, str, str, str]]:
    """(template, result, name, parameters) of what a header of ptx/ defines."""
    text = path.read_text()
    body = _MACROS.sub("", text[text.index("namespace fused_lm") :])
    found = set()
    for template, result, name, parameters in _FUNCTION.findall(body):
        if name in _OF_ONE_SIDE:
            continue
        parts = (template, _QUALIFIERS.sub("", result), name, _HOST_ONLY.sub("", parameters))
        found.add(tuple(" ".join(part.split()) for part in parts))
    return found


@pytest.mark.parametrize(
    "header", sorted(path.name for path in (build.ROOT / "csrc/ptx").glob("*.h"))
)
def test_device_and_host_declare_the_same(header: str) -> None:
    device, host = build.ROOT / "csrc/ptx" / header, build.HERE / "ptx" / header
    assert host.is_file()
    # The host's stand for what nvcc gives, and one more width of products, which the host's have.
    if header in ("builtins.h", "wgmma_n48.h"):
        return
    assert _functions(device)
    assert _functions(device) == _functions(host)
