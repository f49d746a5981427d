"""Attention over a KV cache by ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fused_lm.reference.attention_decode import seen_keys


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
) -> Tensor:
    """Shapes and meaning as in the reference, without lse."""
    k, v, mask = seen_keys(q.shape[2], k_cache, v_cache, cache_lens, block_table, lower, upper)
    rows, mask = packed_groups(q, mask, k.shape[1])
    out = F.scaled_dot_product_attention(rows, k, v, mask, scale=scale)
    return out.reshape(*q.shape[:3], v.shape[3])


def packed_groups(q: Tensor, mask: Tensor, Hkv: int) -> tuple[Tensor, Tensor]:
    """The queries of all heads that share keys as the rows of one head, [B, Hkv, group * T, D], and
    their mask [B, 1, group * T, S]: keys are read once per group, not once per head.
    """
    group = q.shape[1] // Hkv
    if group == 1:
        return q, mask
    return q.unflatten(1, (Hkv, group)).flatten(2, 3), mask.repeat(1, 1, group, 1)
