"""Jobs in a process of their own, so that a crash or a hang of one never loses the others.

The worker takes the jobs' indices, works them off in order and appends one JSON line per job to a
file, flushed at once. When it dies or says nothing for too long, the job it was at is written down
as lost and a new worker starts behind it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
RESTART = 3
"""Exit status of a worker that has written its job's result but has lost its CUDA context."""


def supervise(
    command: Sequence[str],
    jobs: Sequence[int],
    results: Path,
    job_seconds: float,
    total_seconds: float,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
    stop: threading.Event | None = None,
) -> list[dict[str, Any]]:
    """Runs ``command`` with ``--jobs 3,15 --results FILE`` appended until all jobs are done.

    Args:
        command: The worker; it writes {"job": index, ...} per job and exits 0 at the end.
        jobs: Their indices, in the order to work them off; a restart gets what is left of them.
        results: JSON-lines file, appended to.
        job_seconds: Longest silence before a worker counts as hung (the first job pays the start).
        total_seconds: No worker runs longer than until then; what is not done by then is left out.
        on_result: Called with each result as it comes.
        stop: Once set, the worker is killed and its job is left out, as after a Ctrl-C.
    Returns:
        Results in the order of ``jobs``; a lost job is {"job": index, "problem": sentence,
        "lost": True}.
    """
    end = time.monotonic() + total_seconds
    stop = stop or threading.Event()
    found: list[dict[str, Any]] = []
    results.touch()
    while len(found) < len(jobs) and time.monotonic() < end and not stop.is_set():
        start = len(found)
        before = results.stat().st_size
        log = results.with_suffix(f".{jobs[start]}.log")
        with log.open("w") as output:
            worker = subprocess.Popen(
                [*command, "--jobs", ",".join(map(str, jobs[start:])), "--results", str(results)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            reason = _watch(worker, results, before, job_seconds, end, found, on_result, stop)
        interrupted = stop.is_set() or worker.returncode == -signal.SIGINT
        if reason is None or interrupted or time.monotonic() >= end:
            break
        if worker.returncode == RESTART and len(found) > start:
            continue
        sentence = f"{reason}; {_last_line(log)}"
        lost = {"job": jobs[len(found)], "problem": sentence, "lost": True}
        with results.open("a") as file:
            file.write(json.dumps(lost) + "\n")
        found.append(lost)
        on_result(lost)
    return found


def _watch(
    worker: subprocess.Popen[bytes],
    results: Path,
    offset: int,
    job_seconds: float,
    end: float,
    found: list[dict[str, Any]],
    on_result: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> str | None:
    """Collects results until the worker ends; None if it ended well, else why the next job is
    lost.
    """
    heard = time.monotonic()
    try:
        while True:
            ended = worker.poll() is not None
            with results.open("rb") as file:
                file.seek(offset)
                text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            offset += len(complete)
            for line in complete.splitlines():
                found.append(json.loads(line))
                on_result(found[-1])
                heard = time.monotonic()
            if ended:
                return None if worker.returncode == 0 else f"exit status {worker.returncode}"
            if stop.is_set():
                return "stopped"
            if time.monotonic() > end:
                return "out of time"
            if time.monotonic() - heard > job_seconds:
                return f"no answer in {job_seconds:.0f} s"
            time.sleep(POLL_SECONDS)
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "nothing printed"
