"""What the package ships as proven: ``python -m benchmarks.ship`` writes ``fused_lm/verified.json``
from the raw results of ``fused-lm verify`` below ``benchmarks/results``.
"""

from __future__ import annotations

import json
from pathlib import Path

from fused_lm import records
from fused_lm.commands.verify import by_class, records_of

RESULTS = Path(__file__).parent / "results"


def proven() -> list[records.Record]:
    """One record per kernel, GPU and class."""
    lines = [
        json.loads(line)
        for path in sorted(RESULTS.glob("**/results.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return list(by_class(records_of(lines)).values())


def main() -> None:
    found = proven()
    records.save(records.SHIPPED, found)
    print(f"{len(found)} records in {records.SHIPPED}")


if __name__ == "__main__":
    main()
