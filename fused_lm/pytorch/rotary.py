"""Rotary positions by PyTorch's elementwise operators, which Inductor fuses."""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.layout import rows_first
from fused_lm.reference.rotary import table_rows, turn


def rotary(
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Each of ``tensors`` [B, H, T, D] turned by the same rows of the tables, in its own order."""
    T = tensors[0].shape[2]
    cos, sin = table_rows(cos, positions, T), table_rows(sin, positions, T)
    return tuple(_turn_in_order(t, cos, sin, interleaved) for t in tensors)


def _turn_in_order(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``torch.cat`` writes a contiguous result: it is given the dims as they lie in memory."""
    if not rows_first(x):
        return turn(x, cos, sin, interleaved)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    else:
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return turn(x.transpose(1, 2), cos, sin, interleaved).transpose(1, 2)
