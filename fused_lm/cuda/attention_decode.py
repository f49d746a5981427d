"""Attention over a KV cache by ``csrc/attention_decode.cpp``, which reads it where it lies.

Arguments are those of ``fused_lm.reference.attention_decode``; the dispatcher refuses what is no
float16 or bfloat16, and head dims that are no multiples of 8 up to 256.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.cuda import extension


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
    return extension.op("attention_decode_fwd")(
        q, k_cache, v_cache, cache_lens, block_table, lower, upper, scale, softcap
    )
