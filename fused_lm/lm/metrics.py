"""What a model knows of a text: loss, perplexity, bits per byte, next-token accuracy.

Perplexity and accuracy are per token and so depend on the tokenizer; bits per byte don't:

    bits per byte = nats of all targets / (ln 2 * bytes of all targets)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lm.lm.data import Windows
from fused_lm.lm.parallel import SOLO, Team
from fused_lm.lm.precision import Precision
from fused_lm.lm.step import LossModule, to_device

NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class Score:
    """Sums over scored targets.

    Attributes:
        nats: Cross-entropy in all.
        correct: Targets that were the likeliest token.
        tokens, bytes: Targets, and the bytes that they stand for.
    """

    nats: float
    correct: int
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of targets that the model thought likeliest."""
        return self.correct / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / NATS_PER_BIT / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """All of these, by name."""
        names = ("loss", "bits_per_byte", "perplexity", "accuracy", "tokens", "bytes")
        return {name: getattr(self, name) for name in names}


class RunningLoss:
    """Losses of the steps since the last log line, and the bytes that they are about.

    It travels through a checkpoint, so that the line after a resume is the one that an
    uninterrupted run would have written.
    """

    def __init__(self, device: torch.device, byte_lengths: np.ndarray, team: Team) -> None:
        self._byte_lengths, self._team = byte_lengths, team
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self._bytes = 0

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """A step's mean loss in nats and its targets, [B, T] on the CPU, of this process."""
        self._sum += loss
        self.steps += 1
        self._bytes += int(self._byte_lengths[targets.numpy()].sum())

    def state(self) -> dict[str, Any]:
        """Sum of losses, steps and bytes, over all processes; every process calls it."""
        loss_sum, num_bytes = self._team.sum([float(self._sum), float(self._bytes)])
        return {
            "loss_sum": loss_sum / self._team.size,
            "count": self.steps,
            "bytes": int(num_bytes),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a :meth:`state`."""
        # One process carries all of it: a share of each would be rounded.
        self._sum.fill_(state["loss_sum"] * self._team.size if self._team.is_first else 0.0)
        self.steps = state["count"]
        self._bytes = state["bytes"] if self._team.is_first else 0

    def reset(self) -> None:
        """Forgets all steps."""
        self.restore({"loss_sum": 0.0, "count": 0, "bytes": 0})


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; inf above the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and correct guesses of each window.

    Args:
        logits: [B, T, V]. targets: [B, T] integers.
    Returns:
        [B] fp64 each.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide.transpose(1, 2), targets, reduction="none")
    return nats.double().sum(1), (logits.argmax(-1) == targets).double().sum(1)


@torch.no_grad()
def evaluate(
    root: LossModule,
    windows: Windows,
    num_tokens: int,
    batch: int,
    precision: Precision,
    byte_lengths: np.ndarray,
    should_stop: Callable[[], bool] = lambda: False,
    team: Team = SOLO,
) -> Score | None:
    """Scores evenly spaced windows, the same ones every time; each process of a team some of them.

    Args:
        root: Left in eval mode; its device is where it runs.
        windows: Of the validation text.
        num_tokens: Targets to score, about; all of them at most.
        batch: Windows at a time.
        byte_lengths: [V], bytes of each token.
        should_stop: Asked after every batch.
    Returns:
        The sums, the same in every process, or None if a stop was asked for.
    """
    starts = windows.evenly_spaced(max(1, num_tokens // windows.context))
    device = next(root.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    num_bytes = 0
    root.eval()
    for first in range(0, len(starts), batch):
        rows = starts[first : first + batch]
        own = rows[team.rank :: team.size]
        # A process without a window still takes part, with one that counts for nothing.
        tokens, targets = windows.gather(own if len(own) else rows[:1])
        with precision.autocast():
            nats, correct = root(*to_device((tokens, targets), device), score_logits)
        if len(own):
            sums += torch.stack((nats.sum(), correct.sum()))
            num_bytes += int(byte_lengths[targets.numpy()].sum())
        if team.any(should_stop()):
            return None
    nats_in_all, correct_in_all, bytes_in_all = team.sum([*sums.tolist(), float(num_bytes)])
    count = len(starts) * windows.context
    return Score(nats_in_all, int(correct_in_all), count, int(bytes_in_all))
