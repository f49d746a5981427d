"""How tensors [B, H, T, D] lie in memory: results take the order of what they are made of.

The heads of a packed projection are views whose rows lie as [B, T, H, D]. What is computed from
them keeps that order, so that ``out.transpose(1, 2).reshape(B, T, H * D)`` is a view again.
"""

from __future__ import annotations

from torch import Tensor
from torch._C import _are_functorch_transforms_active


def rows_first(t: Tensor) -> bool:
    """Whether ``t`` [B, H, T, D] lies as [B, T, H, D], the heads of a row side by side."""
    return t.stride(2) > t.stride(1)


def empty_heads(like: Tensor, D: int) -> Tensor:
    """Uninitialised [B, H, T, D], dense, with B, H, T, dtype and memory order of ``like``.

    No transposed view: what an operator returns must not be one, or autograd forbids to change it.
    """
    B, H, T, _ = like.shape
    if rows_first(like):
        return like.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))
    return like.new_empty(B, H, T, D)


def ordered_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [B, H, T, D] as :func:`empty_heads` would have made it.

    Transforms and tensor subclasses keep what they have: there the order is nobody's promise.
    """
    if type(t) is not Tensor or _are_functorch_transforms_active():
        return t
    if t.is_contiguous() and not rows_first(like) and not t._is_view():
        return t
    return empty_heads(like, t.shape[3]).copy_(t)
