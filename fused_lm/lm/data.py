"""How a text is split, and the windows a model reads.

By default a token is a byte, so there is nothing to train before training and every text works;
corpus.py makes other tokens of the same slices. ``split_text`` holds out validation bytes:

    block 0                       block 1                       ...
    |======= train =======|= val =|======= train =======|= val =|

Every block of 64 KiB gives its last tenth. Neighbouring bytes are never dealt out at random, which
would put the answer to a validation byte into the training text; and no whole file or last tenth of
the text is held out, which would measure how that one file differs from the rest. A window never
crosses the border of its slice, so no validation byte is ever a training target or context, nor the
reverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fused_lm.lm.text import DataError, Text

BLOCK_BYTES = 65536
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Windows:
    """Windows of ``context`` inputs and their next tokens, inside given slices of a text.

    Attributes:
        data: [n] unsigned integers, the tokens.
        ranges: [R, 2] int64, start and end of each slice, each at least ``context + 1`` long.
        context: Inputs per window; a window reads ``context + 1`` tokens.
    """

    data: np.ndarray
    ranges: np.ndarray
    context: int

    @property
    def num_tokens(self) -> int:
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    def gather(self, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each [B, context] int64, of the windows at ``starts`` [B]."""
        window = self.data[starts[:, None] + np.arange(self.context + 1)]
        tokens = torch.from_numpy(window.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def evenly_spaced(self, count: int) -> np.ndarray:
        """Starts of at most ``count`` windows that share no target, spread over all slices."""
        per_range = (self.ranges[:, 1] - self.ranges[:, 0] - 1) // self.context
        total = int(per_range.sum())
        count = min(count, total)
        picks = np.arange(count, dtype=np.int64) * total // max(count, 1)
        return self._locate(picks, per_range, self.context)

    def random(self, count: int, generator: torch.Generator) -> np.ndarray:
        """``count`` starts, uniform over every possible window."""
        per_range = self.ranges[:, 1] - self.ranges[:, 0] - self.context
        picks = torch.randint(int(per_range.sum()), (count,), generator=generator).numpy()
        return self._locate(picks, per_range, 1)

    def _locate(self, picks: np.ndarray, per_range: np.ndarray, stride: int) -> np.ndarray:
        ends = np.cumsum(per_range)
        row = np.searchsorted(ends, picks, side="right")
        return self.ranges[row, 0] + (picks - (ends - per_range)[row]) * stride


def split_text(text: Text, context: int) -> tuple[Windows, Windows]:
    """Training and validation windows of a text: the last tenth of every block is held out.

    Raises:
        DataError: If the text is too short for one window of each.
    """
    window = context + 1
    size = int(text.data.size)
    if size < 2 * window:
        raise DataError(
            f"{text.name} has {size} bytes, but a context of {context} needs {2 * window}: "
            "one window to learn from and one held out; give a longer text or a smaller --context."
        )
    train, validation = split_ranges(size, window)
    return Windows(text.data, train, context), Windows(text.data, validation, context)


def split_ranges(size: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out slices of ``size >= 2 * window`` bytes.

    Returns:
        Start and end of each slice, [R, 2] int64 twice; every slice has at least ``window`` bytes.
    """
    block = max(BLOCK_BYTES, math.ceil(2 * window / VALIDATION_SHARE))
    borders = np.linspace(0, size, max(1, size // block) + 1).astype(np.int64)
    held_out = np.maximum((np.diff(borders) * VALIDATION_SHARE).astype(np.int64), window)
    cuts = borders[1:] - held_out
    train = np.stack([borders[:-1], cuts], axis=1)
    return train, np.stack([cuts, borders[1:]], axis=1)


class BatchSampler:
    """Endless random batches of training windows, with a generator of its own.

    The generator is not torch's global one, so that dropout, evaluation or a user's own draws don't
    change which text is read; ``state`` and ``set_state`` carry it through a checkpoint.

    Args:
        windows: To draw from.
        batch: Windows per batch, B.
        seed: Of the generator.
        rank, processes: All processes draw the same batch, and each reads its share, B/processes
            windows.
    """

    def __init__(
        self, windows: Windows, batch: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.windows = windows
        self.batch = batch
        share = batch // processes
        self._own = slice(rank * share, (rank + 1) * share)
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of this process, each [B/processes, T] int64 on the CPU."""
        return self.windows.gather(self.windows.random(self.batch, self.generator)[self._own])

    def state(self) -> torch.Tensor:
        return self.generator.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)
