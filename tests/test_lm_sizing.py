"""Learning rate, length and size of a run, on clocks of the tests' own."""

from __future__ import annotations

import math

import pytest

from fused_lm.lm import measure, sizing
from fused_lm.lm.schedule import Length, default_warmup, learning_rate
from fused_lm.lm.sizing import Cost, Measured, Rung, choose_rung, fastest_threads, time_step


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert learning_rate(1.0, 0, 10, 0.0) == pytest.approx(0.1)
    assert learning_rate(1.0, 9, 10, 0.0) == 1.0
    assert learning_rate(1.0, 50, 10, 0.5) == pytest.approx(0.5)
    assert learning_rate(2.0, 50, 0, 0.25) == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert learning_rate(1.0, 99, 10, 1.0) == learning_rate(1.0, 99, 10, 1.7) == 0.0
    rates = [learning_rate(1.0, 100, 10, p / 100) for p in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_length_counts_steps_or_seconds() -> None:
    assert Length(steps=8).progress(2, 1e9) == 0.25
    timed = Length(seconds=100.0)
    assert timed.progress(0, 20.0, begin_s=20.0) == 0.0
    assert timed.progress(5, 60.0, begin_s=20.0) == 0.5
    assert timed.progress(5, 100.0, begin_s=20.0) == timed.progress(0, 101.0, begin_s=101.0) == 1.0
    assert timed.expected_steps(10, 50.0, 0.5) == 110
    for wrong in ({}, {"steps": 3, "seconds": 1.0}):
        with pytest.raises(ValueError, match="either steps or seconds"):
            Length(**wrong)
    assert [default_warmup(n) for n in (1, 1000, 10**6)] == [10, 30, 200]


class FakeMachine:
    """Steps that take a given time per parameter on a clock of its own; no time passes."""

    def __init__(self, parameters: list[int], seconds_per_parameter: float) -> None:
        self.now = 0.0
        self.measuring_steps = 5
        self.seconds_per_parameter = seconds_per_parameter
        self.ladder = tuple(
            Rung(layers=i, width=64, heads=1, context=128, batch=16, lr=1e-3)
            for i in range(1, len(parameters) + 1)
        )
        self.parameters = dict(zip(self.ladder, parameters, strict=True))
        self.measured: list[Measured] = []

    def clock(self) -> float:
        return self.now

    def measure(self, rung: Rung) -> Cost:
        seconds = self.parameters[rung] * self.seconds_per_parameter
        self.now += self.measuring_steps * seconds
        return Cost(self.parameters[rung], seconds)

    def choose(self, budget_s: float, train_bytes: int = 10**7) -> int:
        chosen = choose_rung(
            self.ladder, budget_s, train_bytes, self.measure, self.clock, self.measured.append
        )
        return chosen.rung.layers


@pytest.mark.parametrize(
    ("seconds_per_parameter", "layers"),
    [
        pytest.param(1e-3, 1, id="slow machine takes the smallest"),
        pytest.param(2e-7, 2, id="a laptop"),
        pytest.param(5e-8, 3, id="faster"),
        pytest.param(1e-11, 4, id="GPU climbs to the top"),
    ],
)
def test_size_follows_measured_speed(seconds_per_parameter: float, layers: int) -> None:
    machine = FakeMachine([100_000, 400_000, 800_000, 2_000_000], seconds_per_parameter)
    assert machine.choose(budget_s=280.0) == layers
    *below, last = machine.measured
    assert all(m.affordable for m in below)
    assert last.affordable == (layers == 4)


def test_size_stops_at_the_text_and_at_the_time_for_measuring() -> None:
    fast = FakeMachine([10_000, 20_000, 90_000], 1e-11)
    assert fast.choose(budget_s=280.0, train_bytes=20_000) == 2
    slow_to_measure = FakeMachine([100, 200, 300], 1e-4)
    slow_to_measure.measuring_steps = 100
    assert slow_to_measure.choose(budget_s=40.0) == 2
    assert slow_to_measure.now > sizing.MEASURING_SHARE * 40.0
    with pytest.raises(ValueError, match="ladder is empty"):
        choose_rung((), 1.0, 1, fast.measure, fast.clock)


def test_ladder_climbs_in_parameters_and_can_be_built() -> None:
    sizes = [r.layers * r.width**2 for r in sizing.LADDER]
    assert sizes == sorted(sizes)
    assert [sizing.rung_for(w).width for w in (16, 128, 200, 4096)] == [64, 128, 256, 768]
    for rung in sizing.LADDER:
        assert rung.width % 64 == 0
        assert measure.config_of(rung, {"positions": "learned"}).positions == "learned"


def test_step_time_is_the_median_after_warming_up() -> None:
    durations = iter([9.0, 9.0, 0.2, 0.1, 0.3])
    now = [0.0]

    def step() -> None:
        now[0] += next(durations)

    assert time_step(step, lambda: now[0], least_s=0.5) == pytest.approx(0.2)


def test_threads_are_halved_while_that_is_faster() -> None:
    seconds = {16: 4.0, 8: 2.0, 4: 1.0, 2: 1.5, 1: 0.1}
    assert fastest_threads(16, seconds.__getitem__) == (1.0, 4)
    assert fastest_threads(1, {1: 3.0}.__getitem__) == (3.0, 1)
    assert fastest_threads(2, {2: 1.7, 1: 0.4}.__getitem__) == (0.4, 1)
