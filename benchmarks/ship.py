"""What the package ships as proven: ``python -m benchmarks.ship`` writes ``fused_lm/verified.json``
from the records below ``benchmarks/results``.
"""

from __future__ import annotations

from fused_lm import records
from fused_lm.commands.verify import by_class, records_of

from .record import records as found


def proven() -> list[records.Record]:
    """One record per kernel, GPU and class."""
    lines = [line for record in found() for line in record.lines("results")]
    return list(by_class(records_of(lines)).values())


def main() -> None:
    made = proven()
    records.save(records.SHIPPED, made)
    print(f"{len(made)} records in {records.SHIPPED}")


if __name__ == "__main__":
    main()
