"""Attention over a KV cache, the derivation: which keys of a cache a query sees, then attention.

The newest T tokens of sequence b are its last ones: query t stands at ``n - T + t``, where n is
the sequence's length, at most the S keys that its cache has room for, and sees the keys

    n - T + t + lower <= s <= n - T + t + upper,  0 <= s < n

A paged cache is the same keys in blocks: key s of sequence b is row ``s % size`` of block
``block_table[b, s // size]``. Keys that no query of a sequence sees count as zeros, whatever lies
there: memory that nobody has written may hold NaN, and 0 NaN is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lm.reference.attention import attention_forward


class SeenKeys(NamedTuple):
    """The keys and values of a cache as :func:`~fused_lm.attention` takes them."""

    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    mask: Tensor  # bool [B, 1, T, S]


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
    """q [B, H, T, D] -> out [B, H, T, Dv], lse [B, H, T]; caches [B, Hkv, S, D or Dv], or blocks
    [blocks, Hkv, block size, D or Dv] that block_table [B, blocks of a sequence] names.
    """
    k, v, mask = seen_keys(q.shape[2], k_cache, v_cache, cache_lens, block_table, lower, upper)
    return attention_forward(q, k, v, mask, None, None, None, None, None, scale, softcap, 0.0)


def seen_keys(
    T: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    lower: int | None,
    upper: int | None,
) -> SeenKeys:
    """Copies of the caches, one row of keys per sequence, and who sees them."""
    if block_table is not None:
        k_cache, v_cache = (gathered(cache, block_table) for cache in (k_cache, v_cache))
    S, device = k_cache.shape[2], k_cache.device
    length = cache_lens.long().clamp(0, S)[:, None, None]
    key = torch.arange(S, device=device)
    # Where a query of another sequence length stands is data: the band is no constant here.
    place = length - T + torch.arange(T, device=device)[:, None]
    mask = (key < length).expand(-1, T, -1)
    if lower is not None:
        mask = mask & (key >= place + lower)
    if upper is not None:
        mask = mask & (key <= place + upper)
    unseen = ~mask.any(1)[:, None, :, None]
    k, v = (cache.masked_fill(unseen, 0.0) for cache in (k_cache, v_cache))
    return SeenKeys(k, v, mask[:, None])


def gathered(cache: Tensor, block_table: Tensor) -> Tensor:
    """[blocks, Hkv, block size, D] -> [B, Hkv, blocks of a sequence * block size, D].

    Entries behind a sequence's end may be anything.
    """
    blocks = cache.shape[0]
    if blocks == 0:
        B, most = block_table.shape
        return cache.new_zeros(B, cache.shape[1], most * cache.shape[2], cache.shape[3])
    return cache[block_table.long().clamp(0, blocks - 1)].transpose(1, 2).flatten(2, 3)
