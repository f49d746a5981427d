"""PyTorch's cross entropy behind the arguments of :func:`fused_lm.cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> Tensor:
    """logits [..., V], target [...] -> loss, fp32 (fp64 for fp64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        target.reshape(-1).long(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss
