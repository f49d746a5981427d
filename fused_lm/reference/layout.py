"""How tensors [B, H, T, D] lie in memory: results take the order of what they are made of.

The heads of a packed projection are views whose rows lie as [B, T, H, D]. What is computed from
them keeps that order, so that ``out.transpose(1, 2).reshape(B, T, H * D)`` is a view again.
"""

from __future__ import annotations

from torch import Tensor


def rows_first(t: Tensor) -> bool:
    """Whether ``t`` [B, H, T, D] lies as [B, T, H, D], the heads of a row side by side."""
    return t.stride(2) > t.stride(1)


def empty_heads(like: Tensor, D: int) -> Tensor:
    """Uninitialised [B, H, T, D], dense, with B, H, T, dtype and memory order of ``like``."""
    B, H, T, _ = like.shape
    if rows_first(like):
        return like.new_empty(B, T, H, D).transpose(1, 2)
    return like.new_empty(B, H, T, D)


def ordered_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides that :func:`empty_heads` gives a tensor like ``like``."""
    if rows_first(like):
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.contiguous()
