"""Runs one scratch file of kernels on the race build: ``python -m tests.simt.try_kernel FILE.cu``.

Every ``PLANT(kernel, ...)`` of the file (planted/case.h) runs in all orders and timings, a second
time with its mistake where the file asks for ``kBug``. Exit status 1: a right version was reported,
or a wrong one was not.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

from tests.simt import build, runtime

SCHEDULES = [
    *(runtime.Schedule(*both) for both in itertools.product(runtime.ORDERS[:3], ("eager", "lazy"))),
    *(runtime.Schedule("random", "random", seed) for seed in range(1, 9)),
]
_DECLARED = re.compile(r"template\s*<bool kBug>")
_PLANTED = re.compile(r"^PLANT\((\w+)", re.MULTILINE)


def reports(file: Path) -> dict[tuple[str, bool], Counter[str]]:
    """(kernel, with its mistake) -> how many schedules said what; empty text: nothing.

    Raises:
        RuntimeError: The compiler's words.
    """
    harness = runtime.Harness("race", file.resolve())
    found: dict[tuple[str, bool], Counter[str]] = {}
    text = file.read_text()
    versions = (False, True) if "kBug" in _DECLARED.sub("", text) else (False,)
    for kernel, wrong in itertools.product(_PLANTED.findall(text), versions):
        said = found[kernel, wrong] = Counter()
        for schedule in SCHEDULES:
            harness.configure(schedule)
            try:
                harness.module.run_planted(kernel, wrong)
                said[""] += 1
            except RuntimeError as error:
                said[str(error)] += 1
    return found


def main() -> None:
    """Prints what was said, the most frequent first."""
    problem = build.unavailable() or (None if len(sys.argv) == 2 else __doc__)
    if problem is not None:
        raise SystemExit(problem)
    failed = False
    for (kernel, wrong), said in reports(Path(sys.argv[1])).items():
        failed |= (said[""] > 0) if wrong else (said[""] < len(SCHEDULES))
        print(f"{kernel}, {'with' if wrong else 'without'} its mistake:")
        for text, times in said.most_common():
            if times:
                print(f"  {times} of {len(SCHEDULES)} schedules: {text or 'nothing'}")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
