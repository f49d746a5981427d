"""PyTorch's linear, dropout and add behind the arguments of :func:`fused_lm.linear_residual`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    dropout_p: float,
    transposed: bool,
) -> Tensor:
    """x [..., C], residual [..., F] -> [..., F]."""
    z = F.linear(x, weight.T if transposed else weight, bias)
    return residual + (F.dropout(z, dropout_p) if dropout_p > 0.0 else z)
