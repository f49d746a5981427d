"""``benchmarks/STATUS.md``: which kernels have run on a GPU, and how they did there.

A kernel is current if its code is still what ran: of a Triton kernel its source, of a CUDA kernel
its source, what that includes and what launches it, comments and layout aside. What is not is
stale: a record of it speaks of a kernel that is no longer there.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Iterator, Sequence

from build_tools.cuda_build import host_code_of
from fused_lm import dispatch
from fused_lm import records as evidence
from fused_lm.cuda.extension import code_hashes
from fused_lm.parity.run import NOT_MEASURED
from tests.golden import compiled_kernels

from .contest import OURS, RACES
from .record import Line, Record, gpus, records, times_of, verified

NEVER_RUN = "checked on the CPU, not yet run on a GPU"
HEAD = """# What has run on a GPU

Written by `python -m benchmarks.report` from the records below `results/`, never by hand. A record
names its day and commit. "Current" kernels are those of this source tree; "stale" ones have changed
since they ran.
"""


def status(found: list[Record]) -> str:
    """The text of STATUS.md."""
    if not found:
        return f"{HEAD}\nNot yet run on a GPU.\n"
    return "\n".join([HEAD, *(_of_gpu(gpu, found) for gpu in gpus(found))])


def _of_gpu(gpu: str, found: list[Record]) -> str:
    own = [record for record in found if record.gpu == gpu]
    parts = [
        f"## {gpu}\n",
        "### Operators\n",
        _table(OPERATORS, operators(gpu, own)),
        "### Sources of the CUDA kernels\n",
        _table(("source", "machine code", "record", "kernels that ran", "now"), sources(own)),
        "### Proofs\n",
        _table(("record", "stage", "how it went", "last words"), proofs(own)),
        "### Against others\n",
        "Their time by that of the fastest of ours, case by case: above 1 ours is faster.\n",
        _table(("race", "pass", "against", "cases", "least", "median", "most"), ratios(gpu, own)),
    ]
    return "\n".join(parts)


OPERATORS = (
    *("operator", "backend", "dtype", "kernel", "record", "now", "within tolerance"),
    *("timed", "by PyTorch's time: inference", "training"),
)


def operators(gpu: str, own: list[Record]) -> Iterator[tuple[str, ...]]:
    """A row per operator, backend and dtype, of the newest kernel that was verified."""
    groups: dict[tuple[str, str, str], list[tuple[Record, Line]]] = {}
    for record, line in verified(gpu, own):
        if "kernel" in line and line.get("worst") != NOT_MEASURED:
            key = line["op"], line["backend"], line["dtype"]
            groups.setdefault(key, []).append((record, line))
    current = current_ids(own)
    for op, backend, dtype in _in_order(groups):
        lines = groups[op, backend, dtype]
        newest = max(lines, key=lambda pair: pair[0].when)[1]["kernel"]
        same = [(record, line) for record, line in lines if line["kernel"] == newest]
        passed = sum(bool(line["parity"]) for _, line in same)
        timed = [line["times"] for _, line in same if "times" in line]
        yield (
            *(op, backend, dtype, f"`{newest}`", same[-1][0].label),
            _now(same[-1][1], current),
            *(f"{passed} of {len(same)}", str(len(timed))),
            *(_spread([times[mode]["ratio"] for times in timed]) for mode in ("infer", "train")),
        )


def _now(line: Line, current: set[str]) -> str:
    """Whether what ran is what this source tree holds; a backward may change alone."""
    if line["kernel"] not in current:
        return "stale"
    trained = line.get("training_kernel")  # lines of before have none
    changed = (line["op"], line["backend"]) in evidence.TRAINING_SOURCES
    same = trained in current if trained else not changed
    return "current" if same else "current, training stale"


def _in_order(groups: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    ops, dtypes = list(dispatch.TABLE), ("bfloat16", "float16", "float32")
    return sorted(groups, key=lambda g: (ops.index(g[0]), g[1], dtypes.index(g[2])))


def _spread(ratios: Sequence[float]) -> str:
    """Least, median and most."""
    if not ratios:
        return ""
    low, high = min(ratios), max(ratios)
    return f"{low:.2f} to {high:.2f}, median {statistics.median(ratios):.2f}"


def current_ids(own: list[Record]) -> set[str]:
    """Ids of kernels that ran and are what this source tree holds."""
    found = set()
    for record in own:
        version = record.about.get("environment", {}).get("triton", "")
        minor = ".".join(version.split(".")[:2])
        for op, backend in evidence.KERNEL_SOURCES:
            if backend == "triton":
                found.add(evidence.triton_kernel_id(op, minor))
            for mode in ("infer", "train") if backend == "cuda" else ():
                if (built := _built_id(record, op, mode)) is not None:
                    found.add(built)
    return found


def _built_id(record: Record, op: str, mode: str = "infer") -> str | None:
    """What the record's GPU ran of an operator in CUDA, if its sources are still the same."""
    build, target = record.build(), _target(record)
    hashes = []
    for unit in evidence.sources_of(op, mode):
        host = build.get("host_code", {}).get(unit)
        if host is None or host != host_code_of(unit):
            return None
        hashes += [*code_hashes(build["kernels"][unit], target), host]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def _target(record: Record) -> str:
    capability = record.about.get("gpus", [{}])[0].get("capability", "")
    return f"sm_{capability.replace('.', '')}"


def sources(own: list[Record]) -> Iterator[tuple[str, ...]]:
    """A row per source, as the newest record has it whose tests came to their end and ran one of
    its kernels: how many, of those that are compiled for this GPU now.
    """
    tested = [record for record in own if record.build() and _finished(record)]
    newest = [unit for record in tested[-1:] for unit in record.build()["kernels"]]
    for unit in [*newest, *sorted(_cuda_units() - {*newest})]:
        record = next((r for r in reversed(tested) if _ran(r, unit)), None)
        if record is None:
            yield f"{unit}.cu", "none", "none", "", NEVER_RUN
            continue
        build, ran, compiled = record.build(), record.kernels(), _compiled(record, unit)
        now = "current" if build["host_code"].get(unit) == host_code_of(unit) else "stale"
        code = ", ".join(code_hashes(build["kernels"][unit], _target(record)))
        count = "not counted" if ran is None else f"{len(compiled & ran)} of {len(compiled)}"
        yield f"{unit}.cu", f"`{code}`", record.label, count, now


def _finished(record: Record) -> bool:
    """Whether its tests of the kernels came to their end, good or bad."""
    return record.stages().get("kernels", {}).get("status") in ("done", "failed")


def _ran(record: Record, unit: str) -> bool:
    """Whether one of the unit's kernels did; where nobody counted, whether it was there."""
    ran = record.kernels()
    there = unit in record.build()["kernels"]
    return there and (ran is None or not ran.isdisjoint(_compiled(record, unit)))


def _compiled(record: Record, unit: str) -> set[str]:
    """A unit's kernels for the record's GPU."""
    return compiled_kernels(unit, (_target(record), f"{_target(record)}a"))


def _cuda_units() -> set[str]:
    ops = [op for op, backend in evidence.KERNEL_SOURCES if backend == "cuda"]
    return {unit for op in ops for unit in evidence.sources_of(op, "train")}


def proofs(own: list[Record]) -> Iterator[tuple[str, ...]]:
    for record in own:
        for name, stage in record.stages().items():
            if name not in (*RACES, "clocks", "warm"):
                yield record.label, name, str(stage["status"]), stage["said"].strip("= ,")


def ratios(gpu: str, own: list[Record]) -> Iterator[tuple[str, ...]]:
    """A row per race, pass and other contestant."""
    for race in RACES:
        cases: dict[tuple[str, str], dict[str, float]] = {}
        for line in times_of(race, gpu, own):
            cases.setdefault((line["pass"], line["case"]), {})[line["contestant"]] = line["us"]
        found: dict[tuple[str, str], list[float]] = {}
        for (way, _), times in cases.items():
            mine = [us for name, us in times.items() if name in OURS]
            for name, us in times.items():
                if mine and name not in OURS:
                    found.setdefault((way, name), []).append(us / min(mine))
        for (way, name), values in sorted(found.items()):
            middle = statistics.median(values)
            numbers = (f"{value:.2f}" for value in (min(values), middle, max(values)))
            yield (race, way, name, str(len(values)), *numbers)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a sentence if there are no rows."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    if not lines:
        return "Nothing yet.\n"
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines, ""])


if __name__ == "__main__":
    print(status(records()))
