"""The size of a model that a budget of time can train, from measured steps.

A ladder of shapes, small to large, each with the batch it trains with. Real training steps of one
rung after the other are timed, from the smallest up; a rung is affordable if, in the time left, it
can read

    TOKENS_PER_PARAMETER tokens per parameter    (as many as compute-optimal training wants), and
    LEAST_STEPS steps                            (fewer don't get through the warm-up and decay).

The largest affordable rung is taken. Nothing in the rule knows the device: a GPU climbs further
because its steps are faster. A rung with more parameters than ``PARAMETERS_PER_BYTE`` times the
training text is never taken: it would learn the text by heart. Dropout grows with the number of
times the text is read.

On a CPU each rung is timed with fewer threads too: where other programs run, threads that wait for
each other are slower than one alone (2 cores, both busy, 2 layers x 128: 0.6 steps/s with two
threads, 2.4 with one), and so they are on many cores where the model is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

TOKENS_PER_PARAMETER = 8.0
LEAST_STEPS = 300
PARAMETERS_PER_BYTE = 4.0
MEASURING_SHARE = 0.06
"""Share of the budget that measuring may take before the climb stops where it is."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Rung:
    """One shape of the ladder and how it trains.

    Attributes:
        layers, width, heads, context: Shape of the model.
        batch: Windows per step.
        lr: Peak learning rate.
        activation: Of the FFN.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    lr: float
    activation: str = "gelu"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.width}"


LADDER = (
    # ReLU: at 500 steps of the second rung 2.33 bits per byte against 2.45 with GELU, and cheaper.
    Rung(layers=2, width=64, heads=2, context=128, batch=16, lr=5e-3, activation="relu"),
    Rung(layers=2, width=128, heads=4, context=128, batch=16, lr=4e-3, activation="relu"),
    Rung(layers=3, width=128, heads=4, context=128, batch=16, lr=3e-3, activation="relu"),
    Rung(layers=4, width=192, heads=6, context=128, batch=16, lr=2e-3, activation="relu"),
    Rung(layers=4, width=256, heads=4, context=256, batch=16, lr=1.5e-3),
    Rung(layers=6, width=384, heads=6, context=256, batch=32, lr=1e-3),
    Rung(layers=8, width=512, heads=8, context=512, batch=32, lr=8e-4),
    Rung(layers=12, width=768, heads=12, context=512, batch=64, lr=6e-4),
)
DEFAULT_RUNG = LADDER[1]


def rung_for(width: int) -> Rung:
    """The first rung that is at least as wide: wider models want smaller learning rates."""
    return next((rung for rung in LADDER if rung.width >= width), LADDER[-1])


@dataclass(frozen=True)
class Cost:
    """What a rung takes: parameters, and seconds per step with the fastest number of threads.

    ``threads`` is None where they don't matter (a GPU).
    """

    parameters: int
    step_seconds: float
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """A rung with its cost.

    Attributes:
        cost: Measured.
        steps: That fit into the time left after measuring it.
        affordable: Whether they are enough.
    """

    rung: Rung
    cost: Cost
    steps: int
    affordable: bool

    def epochs(self, train_bytes: int) -> float:
        """How often the run reads its text."""
        return self.steps * self.rung.tokens_per_step / max(1, train_bytes)


def needed_steps(rung: Rung, parameters: int) -> int:
    """Steps that make a run of this rung worth it."""
    tokens = TOKENS_PER_PARAMETER * parameters
    return max(LEAST_STEPS, round(tokens / rung.tokens_per_step))


def choose_rung(
    ladder: tuple[Rung, ...],
    budget_s: float,
    train_bytes: int,
    measure: Callable[[Rung], Cost],
    clock: Clock,
    on_measured: Callable[[Measured], None] | None = None,
) -> Measured:
    """Climbs the ladder while the next rung is affordable.

    Args:
        ladder: Small to large; never empty.
        budget_s: Seconds from now until training must end, measuring included.
        train_bytes: Size of the training text.
        measure: Times training steps of a rung.
        clock: Seconds; only differences count.
        on_measured: Told of every rung as it is measured.
    Returns:
        The largest affordable rung, or the smallest if none is.
    """
    if not ladder:
        raise ValueError("choose_rung: the ladder is empty; expected at least one rung")
    start = clock()
    chosen: list[Measured] = []
    for rung in ladder:
        cost = measure(rung)
        if chosen and cost.parameters > PARAMETERS_PER_BYTE * train_bytes:
            break
        spent = clock() - start
        steps = max(0, int((budget_s - spent) / max(cost.step_seconds, 1e-9)))
        enough = steps >= needed_steps(rung, cost.parameters)
        measured = Measured(rung, cost, steps, enough)
        if on_measured is not None:
            on_measured(measured)
        if not chosen or measured.affordable:
            chosen.append(measured)
        if not measured.affordable or spent > MEASURING_SHARE * budget_s:
            break
    return chosen[-1]


def time_step(step: Callable[[], None], clock: Clock, least_s: float = 0.5) -> float:
    """Median seconds of ``step``, after two to warm up, over as many as take ``least_s``."""
    step()
    step()
    times: list[float] = []
    while sum(times) < least_s:
        start = clock()
        step()
        times.append(clock() - start)
    return median(times)


def fastest_threads(most: int, seconds_with: Callable[[int], float]) -> tuple[float, int]:
    """Halves the number of threads from ``most`` down for as long as that makes a step faster.

    Returns:
        Seconds per step and the number of threads.
    """
    best = seconds_with(most), most
    while best[1] > 1:
        fewer = best[1] // 2
        seconds = seconds_with(fewer)
        if seconds >= best[0]:
            break
        best = seconds, fewer
    return best


def suggested_dropout(epochs: float) -> float:
    """Dropout for a run that reads its text ``epochs`` times: none while the text is nearly new."""
    return 0.0 if epochs < 5 else 0.1 if epochs < 20 else 0.2
