"""Rotary positions, the derivation in plain PyTorch.

Row t of a head is R/2 pairs (a, b), each a point in the plane, which the table turns by its angle:

    a' = a cos - b sin
    b' = b cos + a sin

The dims from R on are copied. Pairs are (i, i + R/2), or (2i, 2i + 1) where ``interleaved``. A turn
is orthogonal, so its transpose is its inverse: the gradient of x is the gradient of the result,
turned back (``inverse``: sin negated). It depends on nothing else, nor do the derivatives after it.

Source: Su et al. 2021 (arXiv:2104.09864) section 3.4.2; the pairs (i, i + R/2) are GPT-NeoX's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.reference.layout import ordered_as


def rotary_forward(
    x: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] and k [B, Hkv, T, D] turned, each in its own memory order; (0,) without k."""
    cos, sin = (table_rows(table, positions, x.shape[2]) for table in (cos, sin))
    sin = -sin if inverse else sin
    y = ordered_as(turn(x, cos, sin, interleaved), x)
    if k is None:
        return y, x.new_empty(0)
    return y, ordered_as(turn(k, cos, sin, interleaved), k)


def table_rows(table: Tensor, positions: Tensor | None, T: int) -> Tensor:
    """The rows of a table [S, R/2] that T tokens use: [T, R/2], or [B, 1, T, R/2] for positions
    [B, T].
    """
    if positions is None:
        return table if table.shape[0] == T else table[:T]
    rows = table.index_select(0, positions.flatten())
    return rows if positions.dim() == 1 else rows.unflatten(0, positions.shape).unsqueeze(1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [..., T, D] turned by tables that broadcast against [..., T, R/2]; 16 bits as fp32."""
    half = cos.shape[-1]
    rest = x.shape[-1] - 2 * half
    if cos.dtype.itemsize == 2:
        cos, sin = cos.float(), sin.float()
    # Splits, whose gradient is one concatenation; that of a slice fills and adds a whole tensor.
    if interleaved:
        turning, *others = x.split((2 * half, rest), dim=-1) if rest else (x,)
        a, b = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return (torch.cat((turned, *others), dim=-1) if rest else turned).to(x.dtype)
    a, b, *others = x.split((half, half, rest), dim=-1) if rest else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *others), dim=-1).to(x.dtype)
