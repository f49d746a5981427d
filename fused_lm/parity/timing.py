"""Times of competing calls on a GPU, fair to each: interleaved, behind a flushed L2, medians.

Of small operators the host's work takes longer than the GPU's. The GPU therefore spins before each
call until the whole call is in its queue, and what is measured is the GPU's time alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

WARM_UP = 3
FLUSH_BYTES = 512 << 20
"""Several times the largest L2 there is (126 MB), so that no call finds its inputs in it."""
SPIN_US, MOST_SPIN_US = 1e3, 1e4
SPIN_MARGIN = 1.5
"""The spin in units of the host's time for the slowest call."""
HOST_RUNS = 5
CALIBRATIONS, CALIBRATION_CYCLES = 20, 1_000_000
WALL_FACTOR = 4.0
"""How long flushes, spins and calls may take together, in units of what the calls alone may."""


def interleaved_medians(
    calls: Sequence[Callable[[], None]], seconds: float = 0.1, least: int = 10, most: int = 200
) -> list[float]:
    """Median GPU time of each call in microseconds, see :func:`interleaved_times`."""
    return [median(times) for times in interleaved_times(calls, seconds, least, most)]


def interleaved_times(
    calls: Sequence[Callable[[], None]], seconds: float = 0.1, least: int = 10, most: int = 200
) -> list[list[float]]:
    """GPU times of each call in microseconds, a round of all after the other: from the start of its
    first kernel to the end of its last, as CUDA events see it.

    The host's work is hidden behind a spin of 1 ms on the GPU, or of 1.5 times the host's median
    for the slowest call where that is longer. It counts again where a call waits for the GPU, where
    the host needs more than 10 ms, and where torch has no ``torch.cuda._sleep``.

    Args:
        calls: Run in turn, so that clocks and temperature are the same for all.
        seconds: About how long the calls run on the GPU in all; with flushes and spins, which
            outlast small calls, at most about four times as long.
        least, most: Bounds of the number of rounds.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in calls:
        for _ in range(WARM_UP):
            _time_us(call, flush, 0)
    cycles = _spin_cycles(max(_host_us(call) for call in calls))
    begin = perf_counter()
    estimate = sum(_time_us(call, flush, cycles) for call in calls)
    wall = (perf_counter() - begin) * 1e6
    affordable = seconds * 1e6 / max(estimate, wall / WALL_FACTOR, 1.0)
    rounds = max(least, min(most, int(affordable)))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            found.append(_time_us(call, flush, cycles))
    return times


def _time_us(call: Callable[[], None], flush: torch.Tensor, cycles: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    if cycles:
        _spin(cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _host_us(call: Callable[[], None]) -> float:
    """Median time in which the host enqueues a call."""
    times = []
    for _ in range(HOST_RUNS):
        torch.cuda.synchronize()
        begin = perf_counter()
        call()
        times.append((perf_counter() - begin) * 1e6)
    return median(times)


def _spin_cycles(host_us: float) -> int:
    """How long to spin for calls of which the slowest keeps the host busy for ``host_us``."""
    spin_us = min(MOST_SPIN_US, max(SPIN_US, SPIN_MARGIN * host_us))
    return int(spin_us * _cycles_per_us())


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # private, there since 2017


@functools.cache
def _cycles_per_us() -> float:
    """Cycles of a spin in a microsecond, at the highest clock of a few tries: a GPU that was idle
    takes a while to reach it. 0 where torch can't spin.
    """
    if not hasattr(torch.cuda, "_sleep"):
        return 0.0
    _spin(CALIBRATION_CYCLES)  # loads the kernel
    shortest = float("inf")
    for _ in range(CALIBRATIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _spin(CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        shortest = min(shortest, start.elapsed_time(end) * 1e3)
    return CALIBRATION_CYCLES / shortest


def median(times: Sequence[float]) -> float:
    """The middle one, of an even number the larger."""
    return sorted(times)[len(times) // 2]
