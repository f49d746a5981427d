"""PyTorch's linear layer and cross entropy behind :func:`fused_lm.linear_cross_entropy`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fused_lm.pytorch.cross_entropy import cross_entropy


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """x [..., C], weight [V, C], target [...] -> loss, by way of the whole logits."""
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return cross_entropy(logits, target, ignore_index, label_smoothing, reduction)
