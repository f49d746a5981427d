"""What the package ships as proven: ``python -m benchmarks.ship`` writes ``fused_lm/verified.json``
from the raw results of ``fused-lm verify`` below ``benchmarks/results``.

A ``renamed.json`` beside raw results holds today's ids of the kernels that they name, where the
rule by which a kernel is named has changed since, and not the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fused_lm import records
from fused_lm.commands.verify import by_class, records_of

RESULTS = Path(__file__).parent / "results"


def proven() -> list[records.Record]:
    """One record per kernel, GPU and class."""
    lines = [line for path in sorted(RESULTS.glob("**/results.jsonl")) for line in _lines(path)]
    return list(by_class(records_of(lines)).values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    renamed = path.with_name("renamed.json")
    names = json.loads(renamed.read_text())["kernels"] if renamed.is_file() else {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if "kernel" in line:
            line["kernel"] = names.get(line["kernel"], line["kernel"])
        yield line


def main() -> None:
    found = proven()
    records.save(records.SHIPPED, found)
    print(f"{len(found)} records in {records.SHIPPED}")


if __name__ == "__main__":
    main()
