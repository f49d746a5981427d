"""Rotary positions by PyTorch's elementwise operators, which Inductor fuses."""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.rotary import table_rows, turn


def rotary(
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Each of ``tensors`` [B, H, T, D] turned by the same rows of the tables, contiguous."""
    T = tensors[0].shape[2]
    cos, sin = table_rows(cos, positions, T), table_rows(sin, positions, T)
    return tuple(turn(t, cos, sin, interleaved) for t in tensors)
