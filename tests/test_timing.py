"""Timing on a GPU that is only a clock: what is measured is the GPU's time, not the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_lm.parity import timing

CYCLES_PER_US = 2000.0
FLUSH_US = 120.0
LAUNCHES = 5


class Gpu:
    """A host that enqueues and a GPU that works its queue off; both clocks in microseconds."""

    def __init__(self) -> None:
        self.host = self.idle_from = 0.0
        self.spins: list[float] = []

    def enqueue(self, us: float) -> None:
        self.idle_from = self.now() + us

    def now(self) -> float:
        """When the GPU gets to what the host enqueues now."""
        return max(self.host, self.idle_from)

    def sleep(self, cycles: int) -> None:
        self.spins.append(cycles / CYCLES_PER_US)
        self.enqueue(self.spins[-1])

    def synchronize(self) -> None:
        self.host = self.now()

    def call(self, host_us: float, gpu_us: float) -> Callable[[], None]:
        """A call of several launches, each after its share of the host's work."""

        def run() -> None:
            for _ in range(LAUNCHES):
                self.host += host_us / LAUNCHES
                self.enqueue(gpu_us / LAUNCHES)

        return run


class Event:
    """A CUDA event of the fake GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.now()

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    fake = Gpu()
    flush = SimpleNamespace(zero_=lambda: fake.enqueue(FLUSH_US))

    def empty(*size: Any, **options: Any) -> Any:
        return flush

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(fake))
    monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(timing, "perf_counter", lambda: fake.host / 1e6)
    timing._cycles_per_us.cache_clear()
    yield fake
    timing._cycles_per_us.cache_clear()


@pytest.mark.parametrize("host_us", [10.0, 500.0, 3000.0])
def test_the_hosts_work_is_not_measured(gpu: Gpu, host_us: float) -> None:
    times = timing.interleaved_medians([gpu.call(host_us, 20.0), gpu.call(10.0, 30.0)])
    assert times == pytest.approx([20.0, 30.0])
    assert gpu.spins[-1] == pytest.approx(max(timing.SPIN_US, timing.SPIN_MARGIN * host_us))


def test_without_a_spin_the_hosts_work_is_measured(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cuda, "_sleep")
    (us,) = timing.interleaved_medians([gpu.call(500.0, 20.0)])
    assert us > 300.0 and not gpu.spins


def test_the_spin_has_an_end(gpu: Gpu) -> None:
    (us,) = timing.interleaved_medians([gpu.call(30_000.0, 20.0)])
    assert us > 10_000.0
    assert max(gpu.spins) == pytest.approx(timing.MOST_SPIN_US)


def test_all_rounds_spin_alike_after_one_calibration(gpu: Gpu) -> None:
    for _ in range(2):
        timing.interleaved_medians([gpu.call(500.0, 20.0)])
    calibration = timing.CALIBRATION_CYCLES / CYCLES_PER_US
    assert len({round(us, 6) for us in gpu.spins}) == 2
    assert gpu.spins.count(calibration) == timing.CALIBRATIONS + 1


@pytest.mark.parametrize(("gpu_us", "rounds"), [(1.0, 178), (1000.0, 50), (40_000.0, 10)])
def test_rounds_follow_from_the_calls_and_their_wall_time(
    gpu: Gpu, gpu_us: float, rounds: int
) -> None:
    """Two calls in 0.1 s of their own time or 0.4 s with flushes and spins, 10 rounds at least."""
    timing.interleaved_medians([gpu.call(10.0, gpu_us)] * 2)
    of_the_estimate = 2
    assert len(gpu.spins) - timing.CALIBRATIONS - 1 - of_the_estimate == 2 * rounds
