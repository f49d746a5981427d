"""PyTorch's linears and activations behind the arguments of :func:`fused_lm.ffn`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fused_lm.reference.activations import activate


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, transposed: bool
) -> Tensor:
    """x [..., C] -> [..., F]."""
    return activate(F.linear(x, weight.T if transposed else weight, bias), activation)


def ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    """x [..., C] -> [..., C2]."""
    hidden = linear_act(x, up_weight, up_bias, activation, transposed)
    return F.linear(hidden, down_weight.T if transposed else down_weight, down_bias)
