"""Times of competing calls on a GPU, fair to each: interleaved, behind a flushed L2, medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UP = 3
FLUSH_BYTES = 512 << 20
"""Several times the largest L2 there is (126 MB), so that no call finds its inputs in it."""


def interleaved_medians(
    calls: Sequence[Callable[[], None]], seconds: float = 0.1, least: int = 10, most: int = 200
) -> list[float]:
    """Median time of each call in microseconds, from CUDA events around it.

    Args:
        calls: Run in turn, so that clocks and temperature are the same for all.
        seconds: About how long to measure in all.
        least, most: Bounds of the number of rounds.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in calls:
        for _ in range(WARM_UP):
            call()
    estimate = sum(_time_us(call, flush) for call in calls)
    rounds = max(least, min(most, int(seconds * 1e6 / max(estimate, 1.0))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            found.append(_time_us(call, flush))
    return [sorted(found)[len(found) // 2] for found in times]


def _time_us(call: Callable[[], None], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
