"""Counter-based dropout masks: Philox4x32 with 7 rounds, the same bits in every backend and pass.

An element is named by (batch b, head h, row, column), never by a thread or a tile, so the backward,
another backend, another tile size and a test all draw the same mask:

    counter = (column // 8, row + rng[3], h + rng[2] + (b << 16), rng[1] + (b >> 16))   mod 2**32
    key     = (low, high) 32 bits of rng[0]

One block of four 32-bit words serves eight columns, 16 bits each (word ``lane // 2``, low half
first): Philox costs about as much integer work as an attention tile has to spare. Seven rounds are
the fewest that pass BigCrush. Probabilities are therefore multiples of 2**-16, and kept values are
scaled by the exact inverse of the quantised probability: dropout stays unbiased.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch

ROUNDS = 7
LANE_BITS = 16
LANES = 8
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """A lane is dropped when its 16-bit value is below this: ``round(p * 2**16)``."""
    return round(p * (1 << LANE_BITS))


def dropout_scale(p: float) -> float:
    """What kept values are multiplied by; 0 when everything is dropped."""
    dropped = dropout_threshold(p) / (1 << LANE_BITS)
    return 0.0 if dropped >= 1.0 else 1.0 / (1.0 - dropped)


def philox_4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor], rounds: int = ROUNDS
) -> tuple[torch.Tensor, ...]:
    """Four int64 tensors that hold 32-bit words -> four of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2**64; their upper word survives the arithmetic shift and the
        # mask.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK32) ^ c1 ^ k0,
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ c3 ^ k1,
            first & _MASK32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(rng: torch.Tensor, B: int, H: int, T: int, S: int, p: float) -> torch.Tensor:
    """True where dropout keeps: bool [B, H, T, S].

    Args:
        rng: int64 [4] = (seed, offset, head offset, row offset).
        p: Probability to drop, in [0, 1].
    """
    device = rng.device
    batch = torch.arange(B, device=device).view(B, 1, 1, 1)
    head = torch.arange(H, device=device).view(1, H, 1, 1)
    row = torch.arange(T, device=device).view(1, 1, T, 1)
    block = torch.arange((S + LANES - 1) // LANES, device=device).view(1, 1, 1, -1)
    shape = (B, H, T, block.numel())
    counter = (
        block.expand(shape),
        ((row + rng[3]) & _MASK32).expand(shape),
        ((head + rng[2] + (batch << 16)) & _MASK32).expand(shape),
        ((rng[1] + (batch >> 16)) & _MASK32).expand(shape),
    )
    words = philox_4x32(counter, (rng[0] & _MASK32, (rng[0] >> 32) & _MASK32))
    lanes = [half for word in words for half in (word & 0xFFFF, word >> LANE_BITS)]
    value = torch.stack(lanes, dim=-1).flatten(-2)[..., :S]
    return value >= dropout_threshold(p)


def scaled_keep(
    rng: torch.Tensor, B: int, H: int, T: int, S: int, p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The factor dropout multiplies by: 0 or :func:`dropout_scale`, [B, H, T, S] of ``dtype``."""
    return keep_mask(rng, B, H, T, S, p).to(dtype) * dropout_scale(p)
