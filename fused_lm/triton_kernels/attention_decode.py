"""Attention over a KV cache on Triton: the forward of :mod:`.attention` on a copy of the cache, in
which the keys of a sequence are neighbours, with a mask that says who sees them.

Queries of heads that share keys are the rows of one head, so that keys are read once for them.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.pytorch.attention_decode import packed_groups
from fused_lm.reference.attention_decode import seen_keys
from fused_lm.reference.layout import ordered_as
from fused_lm.triton_kernels.attention import attention_forward


def attention_decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As ``fused_lm.reference.attention_decode.attention_decode_forward``."""
    B, H, T, _ = q.shape
    k, v, mask = seen_keys(T, k_cache, v_cache, cache_lens, block_table, lower, upper)
    rows, mask = packed_groups(q, mask, max(k.shape[1], 1))
    out, lse = attention_forward(
        rows, k, v, mask, None, None, None, None, None, scale, softcap, 0.0
    )
    if rows is q:
        return out, lse
    return ordered_as(out.reshape(B, H, T, v.shape[3]), q), lse.view(B, H, T)
