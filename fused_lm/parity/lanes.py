"""Several supervised workers side by side on one device, each with a share of the jobs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fused_lm.parity.run import NOT_MEASURED
from fused_lm.parity.supervise import supervise

MOST_LANES = 12


def lane_count(kind: str, jobs: int) -> int:
    """How many workers prove at once: a GPU's wait for the CPU, which compiles; a CPU has one."""
    most = min(os.cpu_count() or 1, MOST_LANES) if kind == "cuda" else 1
    return max(1, min(most, jobs))


def run_lanes(
    command: Sequence[str],
    shares: Mapping[str, Sequence[int]],
    folder: Path,
    job_seconds: float,
    seconds: float,
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    """Each share under a supervisor of its own, all at once; none outlives this call.

    Args:
        command, job_seconds, seconds: See :func:`.supervise.supervise`.
        shares: Name of a lane -> its jobs; its raw results are in ``folder/NAME.jsonl``.
        on_result: Called with each result as it comes, by one lane at a time.
    """
    stop = threading.Event()
    lock = threading.Lock()

    def in_turn(result: dict[str, Any]) -> None:
        with lock:
            on_result(result)

    def lane(name: str, share: Sequence[int]) -> None:
        file = folder / f"{name}.jsonl"
        supervise(command, share, file, job_seconds, seconds, in_turn, stop)

    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        try:
            running = [pool.submit(lane, *item) for item in shares.items()]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for done in running:
        done.result()


def prove(
    command: Sequence[str],
    jobs: Sequence[int],
    lanes: int,
    folder: Path,
    job_seconds: float,
    seconds: float,
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    """Jobs in lanes, dealt round robin so that all lanes keep to the order of worth.

    What found no memory beside the other lanes, or was lost, runs again, alone; only that result
    counts.
    """
    end = time.monotonic() + seconds
    short: list[int] = []

    def keep(result: dict[str, Any]) -> None:
        if lanes > 1 and _may_be_the_others_fault(result):
            short.append(result["job"])
        else:
            on_result(result)

    beside = [*command, "--threads", "1"] if lanes > 1 else command
    shares = {f"parity.{lane}": jobs[lane::lanes] for lane in range(lanes)}
    run_lanes(beside, shares, folder, job_seconds, seconds, keep)
    if short:
        alone = {"parity.alone": sorted(short)}
        run_lanes(command, alone, folder, job_seconds, end - time.monotonic(), on_result)


def _may_be_the_others_fault(result: dict[str, Any]) -> bool:
    """No memory, in whatever words; a worker that crashed, or had too little of the CPU."""
    problem = str(result.get("problem")).lower()
    told = any(word in problem for word in ("out of memory", "alloc_failed"))
    return result.get("worst") == NOT_MEASURED or result.get("lost", False) or told
