"""``torch.nn.functional.scaled_dot_product_attention`` behind the arguments of
:func:`fused_lm.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lm.reference.attention import visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Shapes and meaning as in the reference; a float mask is built only where a bias asks for
    one.
    """
    # A comparison of symbolic sizes is no bool to torch's argument parser; a branch makes it one.
    grouped = True if k.shape[1] != q.shape[1] else False  # noqa: SIM210
    if mask is None and key_mask is None and bias is None and lower is None:
        sees_all = upper is None or (q.shape[2] == 1 and upper >= k.shape[2] - 1)
        if sees_all or (type(upper) is int and upper == 0):
            return F.scaled_dot_product_attention(
                q, k, v, None, dropout_p, not sees_all, scale=scale, enable_gqa=grouped
            )
    allowed = merged_mask(q, k, mask, key_mask, lower, upper)
    if bias is not None:
        bias = bias.to(q.dtype)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    if allowed is not None:
        allowed = with_dense_rows(allowed, k.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, allowed, dropout_p, False, scale=scale, enable_gqa=grouped
    )


def with_dense_rows(mask: Tensor, S: int) -> Tensor:
    """``mask`` [..., S] or [..., 1] as [..., S] with neighbours in memory, which PyTorch's kernels
    on a GPU ask for; copied only where they are apart.
    """
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], S)
    return mask if mask.stride(-1) == 1 else mask.clone(memory_format=torch.contiguous_format)


def merged_mask(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    lower: int | None,
    upper: int | None,
) -> Tensor | None:
    """Every mask of a call as one boolean tensor broadcastable to [B, H, T, S], True = attend."""
    parts = [] if mask is None else [mask]
    if key_mask is not None:
        parts.append(key_mask[:, None, None, :])
    band = visible(q.shape[2], k.shape[2], lower, upper, q.device)
    if band is not None:
        parts.append(band)
    if not parts:
        return None
    merged = parts[0]
    for part in parts[1:]:
        merged = torch.logical_and(merged, part)
    return merged
