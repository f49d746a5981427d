"""Where a token stands: sinusoidal tables that are added, rotary tables that turn queries and keys.

Tables are computed from the positions at every call and never stored. They cost T * C sines next to
the T * C * C products of one linear, and a stored table would lose its precision in
``model.bfloat16()`` and its values in ``model.to_empty()``. Angles are fp64: in fp32 that of
position 100 000 is off by up to 0.004.

Sources: Vaswani et al. 2017 (arXiv:1706.03762) section 3.5; Su et al. 2021 (arXiv:2104.09864), with
the pairs (i, i + D/2) of GPT-NeoX and Llama instead of (2i, 2i + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.reference.rotary import turn

ROTARY_BASE = 10000.0
SINUSOIDAL_BASE = 10000.0


def sinusoidal_table(
    positions: Tensor,
    width: int,
    *,
    base: float = SINUSOIDAL_BASE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The table that is added to token embeddings: sines in even columns, cosines in odd ones.

    ``table[t, 2i] = sin(positions[t] / base^(2i/C))``, ``table[t, 2i+1] = cos(the same)``.

    Args:
        positions: [T], any number dtype.
        width: C, odd widths too (the last column is then a sine).
    Returns:
        [T, C] in ``dtype``.
    """
    angles = _angles(positions, (width + 1) // 2, width, base)
    table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
    return table[:, :width].to(dtype)


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    *,
    base: float = ROTARY_BASE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions[t] / base^(2i/D)``, for :func:`apply_rotary`.

    Args:
        positions: [T], any number dtype.
        head_dim: D, even.
    Returns:
        (cos, sin), each [T, D/2] in ``dtype``.
    Raises:
        ValueError: ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise ValueError(
            f"rotary positions turn pairs of dims: head_dim must be even, got {head_dim}"
        )
    angles = _angles(positions, head_dim // 2, head_dim, base)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair ``(x[i], x[i + D/2])`` by its angle, so that q.k depends on t - s only.

    The plain form for any number of dims; :func:`fused_lm.rotary` is the fused one.

    Args:
        x: [..., T, D] queries or keys, any strides.
        cos, sin: [T, D/2] from :func:`rotary_tables`; 16-bit ``x`` is turned in their fp32.
    Returns:
        [..., T, D], dtype of x.
    """
    return turn(x, cos, sin)


def _angles(positions: Tensor, count: int, width: int, base: float) -> Tensor:
    """[T, count] fp64: positions[t] * base^(-2i/width)."""
    pair_idx = torch.arange(count, device=positions.device, dtype=torch.float64)
    frequencies = torch.pow(base, pair_idx * (-2.0 / width))
    return positions.to(torch.float64).unsqueeze(-1) * frequencies
