"""Learning rate and length of a run, by steps or by the clock.

    lr = peak * min(1, (step + 1) / warmup) * (1 + cos(pi * progress)) / 2

``progress`` runs from 0 to 1, over the steps of a run of known length, or over the seconds of a run
that must end on time: then the rate still falls to zero whatever the machine does meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_SHARE = 0.03
WARMUP_MOST = 200
WARMUP_LEAST = 10


def learning_rate(peak: float, step: int, warmup: int, progress: float) -> float:
    """Rate for the update after ``step`` done ones, ``progress`` of the run being over."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    return peak * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def default_warmup(steps: int) -> int:
    """Warm-up steps of a run that is expected to take ``steps``."""
    return min(WARMUP_MOST, max(WARMUP_LEAST, round(steps * WARMUP_SHARE)))


@dataclass(frozen=True)
class Length:
    """When a run ends: after ``steps`` updates or ``seconds`` of training, whichever is given.

    Attributes:
        steps: Updates in all, or None.
        seconds: Seconds in all, counted over every part of a resumed run, or None.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("a run's length is either steps or seconds; got both or neither")

    def progress(self, step: int, elapsed_s: float, begin_s: float = 0.0) -> float:
        """Share of the run's steps that is over, 1 or more when it has ended.

        Args:
            step: Updates taken.
            elapsed_s: Seconds since the run was started, measuring included.
            begin_s: Seconds at which its first step began.
        """
        if self.seconds is None:
            return step / self.steps if self.steps else 1.0
        if elapsed_s >= self.seconds:
            return 1.0
        return (elapsed_s - begin_s) / (self.seconds - begin_s)

    def expected_steps(self, step: int, elapsed_s: float, step_seconds: float) -> int:
        """Updates that the whole run will have taken, at ``step_seconds`` each from now on."""
        if self.steps is not None:
            return self.steps
        left = max(0.0, (self.seconds or 0.0) - elapsed_s)
        return step + max(1, int(left / max(step_seconds, 1e-9)))
