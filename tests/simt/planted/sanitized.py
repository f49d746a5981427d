"""Runs the planted kernels in the asan build, in a process with the sanitizers from its start.

``python -m tests.simt.planted.sanitized`` prints JSON: results of right kernels by schedule, and
what was reported of each mistake. A mistake ends its process, so each runs in a fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.simt import build, runtime
from tests.simt.planted.marks import marks

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60


def environment() -> dict[str, str]:
    """What puts the sanitizers in front of everything else; Python's own leaks are not ours.

    libasan looks for libstdc++'s throw when it starts, and Python has not loaded that by then.
    """
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def run(schedules: Sequence[runtime.Schedule]) -> dict[str, Any]:
    """Starts the process; ``{"right": [{kernel: floats} per schedule], "wrong": {kernel: text}}``.

    Raises:
        RuntimeError: A right kernel was reported, or the process died.
    """
    build.build("asan")
    chosen = json.dumps([[s.order, s.timing, s.seed] for s in schedules])
    done = subprocess.run(
        [sys.executable, "-m", "tests.simt.planted.sanitized", chosen],
        cwd=ROOT,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the sanitized process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def _report_of(harness: runtime.Harness, kernel: str) -> str:
    """What a fork says that runs the mistake."""
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE_S)
            os.dup2(stderr.fileno(), 2)
            try:
                harness.module.run_planted(kernel, True)
            except RuntimeError as error:
                os.write(2, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        stderr.seek(0)
        return stderr.read().decode(errors="replace")


def main() -> None:
    """Prints what :func:`run` returns."""
    schedules = [runtime.Schedule(*given) for given in json.loads(sys.argv[1])]
    harness = runtime.load("asan")
    right = []
    for schedule in schedules:
        harness.configure(schedule)
        kernels = harness.module.planted_kernels()
        right.append({kernel: harness.module.run_planted(kernel, False) for kernel in kernels})
    harness.configure()
    wrong = {m.kernel: _report_of(harness, m.kernel) for m in marks() if m.build == "asan"}
    print(json.dumps({"right": right, "wrong": wrong}))


if __name__ == "__main__":
    main()
