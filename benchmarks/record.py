"""What the records below ``benchmarks/results`` hold, the newest where several measured the same.

A ``withdrawn.json`` in a record lists what its numbers must not be read as any more, and why:
``[{"race", "contestant", "pass", "reason"}]``. The raw lines stay; no table has them. A
``renamed.json`` holds today's ids of the kernels that a record names, where the rule by which a
kernel is named has changed since, and not the kernel.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contest import OURS
from .diary import whole_lines

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One run of the GPU suite, as :mod:`benchmarks.keep` wrote it."""

    folder: Path
    about: dict[str, Any]

    @property
    def gpu(self) -> str:
        return str(self.about["gpu"])

    @property
    def when(self) -> str:
        return str(self.about["pieces"][0])

    @property
    def label(self) -> str:
        """Day and commit."""
        return f"{self.when[:10]}, {self.about['commit']}"

    def lines(self, name: str) -> list[Line]:
        """Of ``name``.jsonl, without what was withdrawn; none if that stage was not reached."""
        path = self.folder / f"{name}.jsonl"
        if not path.is_file():
            return []
        renamed = self._json("renamed.json", {"kernels": {}})["kernels"]
        lines = list(whole_lines(path))
        for line in lines:
            if "kernel" in line:
                line["kernel"] = renamed.get(line["kernel"], line["kernel"])
        withdrawn = [w for w in self.withdrawn() if w["race"] == name]
        keys = ("contestant", "pass")
        return [line for line in lines if not any(_same(line, w, keys) for w in withdrawn)]

    def withdrawn(self) -> list[dict[str, str]]:
        return list(self._json("withdrawn.json", []))

    def stages(self) -> dict[str, dict[str, Any]]:
        return dict(self._json("stages.json", {}))

    def build(self) -> dict[str, Any]:
        """What the extension that ran was built of; nothing if there was none."""
        return dict(self._json("build.json", {}))

    def kernels(self) -> set[str] | None:
        """CUDA kernels that its tests ran; None if nobody looked."""
        path = self.folder / "kernels.txt"
        return {*path.read_text().splitlines()} if path.is_file() else None

    def _json(self, name: str, default: Any) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else default


def _same(line: Line, other: Line, names: tuple[str, ...]) -> bool:
    return all(line.get(name) == other.get(name) for name in names)


def slug(gpu: str) -> str:
    """A folder's name for a GPU: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def records(results: Path = RESULTS) -> list[Record]:
    """All of them, the oldest first."""
    paths = results.glob("*/*/environment.json")
    found = [Record(path.parent, json.loads(path.read_text())) for path in paths]
    return sorted(found, key=lambda record: (record.gpu, record.when))


def gpus(found: list[Record]) -> list[str]:
    return sorted({record.gpu for record in found})


def times_of(race: str, gpu: str, found: list[Record]) -> list[Line]:
    """Lines with a time of one race on one GPU: of a case and pass all of one run, the newest that
    timed one of ours, since contestants of two runs didn't share clocks, inputs or code.

    Cases come in the order in which they were first measured.
    """
    newest: dict[tuple[str, str], list[Line]] = {}
    for record in found:
        if record.gpu == gpu:
            rows: dict[tuple[str, str], list[Line]] = {}
            for line in record.lines(race):
                if "us" in line and "contestant" in line:  # an old race had other names
                    row = rows.setdefault((line["case"], line["pass"]), [])
                    row.append({**line, "record": record.label})
            for key, row in rows.items():
                if key not in newest or any(line["contestant"] in OURS for line in row):
                    newest[key] = row
    return [line for row in newest.values() for line in row]


def counts_more(new: Line, old: Line) -> bool:
    """Of two lines of ``fused-lm verify`` about one kernel and case: whether the newer one stands.
    It does, unless it only repeats, without times, that a timed one is right.
    """
    return not (new.get("parity") and "times" not in new and old.get("parity") and "times" in old)


def verified(gpu: str, found: list[Record]) -> list[tuple[Record, Line]]:
    """Lines of ``fused-lm verify``, each with its record: of the same kernel and case one."""
    standing: dict[tuple[Any, ...], tuple[Record, Line]] = {}
    for record in found:
        if record.gpu == gpu:
            for line in record.lines("results"):
                key = tuple(line.get(n) for n in ("op", "backend", "kernel", "case", "dtype"))
                if key not in standing or counts_more(line, standing[key][1]):
                    standing[key] = record, line
    return list(standing.values())


def roofs_of(gpu: str, found: list[Record]) -> dict[str, float]:
    """Name of a roof -> its newest value."""
    return {
        line["roof"]: line["value"]
        for record in found
        if record.gpu == gpu
        for line in record.lines("roofs")
    }
