"""PyTorch's norms, dropout and add behind the arguments of :func:`fused_lm.layer_norm`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """x [..., C] -> (y, stream)."""
    stream = _stream(x, residual, dropout_p)
    return F.layer_norm(stream, stream.shape[-1:], weight, bias, eps), stream


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """x [..., C] -> (y, stream)."""
    stream = _stream(x, residual, dropout_p)
    return F.rms_norm(stream, stream.shape[-1:], weight, eps), stream


def _stream(x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p)
    return x if residual is None else residual + x
