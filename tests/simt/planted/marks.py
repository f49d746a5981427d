"""Who must report which planted mistake, read from the kernels' own lines.

``// BUG(race,asan): regex`` stands on the line that the report must name, or alone before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_KERNEL = re.compile(r"__global__ void (\w+)\(")
_MARK = re.compile(r"// BUG\(([\w,]+)\): (.+)$")


@dataclass(frozen=True)
class Mark:
    """One expectation: ``build`` says ``pattern`` and names the place."""

    kernel: str
    build: str
    file: str
    line: int
    pattern: str

    def mismatch(self, report: str) -> str | None:
        """What the report lacks, None: nothing."""
        if not re.search(rf"\b{re.escape(self.file)}:{self.line}\b", report):
            return f"does not name {self.file}:{self.line}"
        if not re.search(self.pattern, report, re.DOTALL):
            return f"does not say {self.pattern!r}"
        return None


def marks() -> list[Mark]:
    """All of them, by file and line."""
    found = []
    for path in sorted(HERE.glob("*.cu")):
        found += _marks_of(path)
    return found


def _marks_of(path: Path) -> list[Mark]:
    found, waiting, kernel = [], [], ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        begun = _KERNEL.match(line)
        kernel = begun[1] if begun else kernel
        mark = _MARK.search(line)
        if mark is not None:
            waiting.append((mark[1].split(","), mark[2]))
        if line.lstrip().startswith("//"):
            continue
        for builds, pattern in waiting:
            found += [Mark(kernel, name, path.name, number, pattern) for name in builds]
        waiting = []
    return found
