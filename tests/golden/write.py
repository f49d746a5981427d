"""``make golden``: compiles every kernel for every architecture and writes what ptxas says."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import triton

from tests.test_golden_compile import ARCHS, GOLDEN, compiled, golden_of


def main() -> int:
    lines: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            reports = compiled(arch, Path(folder))
            errors = [f"{r['name']}: {r['error']}" for r in reports if r.get("error")]
            if errors:
                print("\n".join(errors), file=sys.stderr)
                return 1
            lines.update(golden_of(reports))
    path = GOLDEN / f"triton-{triton.__version__}.json"
    path.write_text(json.dumps(lines, indent=0, sort_keys=True) + "\n")
    print(f"{len(lines)} kernels in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
