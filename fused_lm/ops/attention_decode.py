"""``attention_decode``: the public function and the way of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.attention import as_operands
from fused_lm.ops.attention_decode_checks import checked_call
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import attention_decode as pytorch_attention_decode
from fused_lm.reference import attention_decode as reference
from fused_lm.reference.layout import empty_heads


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest T tokens of each sequence to its KV cache, causal from the end.

    Args:
        q: [B, H, T, D] bf16 | fp16 | fp32 | fp64, T usually 1: of sequence b the last T tokens,
            whose keys and values are in the cache.
        k_cache: [B, Hkv, S, D], dtype of q, any strides (a last dim that isn't contiguous is
            copied); Hkv divides H. Or paged [blocks, Hkv, block size, D], any block size.
        v_cache: The same with Dv.
        cache_lens: int32 | int64 [B], keys of each sequence, the T new ones included; what lies
            behind is not looked at, and may be NaN. It stays on the device: a length beyond S is
            taken as S, one below 0 as 0.
        block_table: int32 | int64 [B, most blocks]: block j of sequence b is
            ``k_cache[block_table[b, j]]``. Entries behind a sequence's end may be anything. One
            before it that names no block raises on a CPU; on a GPU, where reading it would wait,
            its result is undefined, without an access outside of the cache.
        causal: Query t sees keys up to ``cache_lens[b] - T + t``, itself; False: all keys.
        window: (left, right), inclusive, None = unbounded: query t sees from left keys before
            itself to right after it. Causal, right is 0 or None.
        scale: Multiplies q.k before the softmax. Default ``D ** -0.5``.
        softcap: c > 0 turns each scaled score x into ``c * tanh(x / c)``.
        return_lse: Also return the log-sum-exp of the scores.
    Returns:
        [B, H, T, Dv], dtype of q. With ``return_lse``: also lse [B, H, T] fp32 (fp64 for fp64),
        natural log. Rows that see no key, of a sequence shorter than T those before its start, are
        0 with lse = -inf, never NaN.
    Accuracy: |err| <= 2 x the error of the same-dtype torch reference (fused_lm/tolerance.py).
        The CUDA kernels add in an order that depends on the shapes, the lengths and the GPU alone:
        they repeat bitwise.
    Memory: the CUDA kernels read the cache where it lies; where they split a sequence, 4*Dv + 8
        bytes per row and split. The others copy the cache.
    Gradients go through the reference.
    Backends: cuda (Ampere and later; 16 bits, head dims that are multiples of 8 up to 256), triton
        (Ampere and later), pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Dao, Haziza, Massa & Sizov 2023 (Flash-Decoding); Kwon et al. 2023 (arXiv:2309.06180)
        for paged caches; Milakov & Gimelshein 2018 (arXiv:1805.02867).
    """
    call = checked_call(
        q, k_cache, v_cache, cache_lens, block_table, causal, window, scale, softcap, return_lse
    )
    backend = dispatch.choose("attention_decode", call)
    if backend == "pytorch":
        return pytorch_attention_decode.attention_decode(*call[:8])
    arguments = (*as_operands(call[:3]), *call[3:-1])
    out, lse = _run(arguments, backend)
    return (out, lse) if return_lse else out


def _run(arguments: tuple[Any, ...], backend: str) -> tuple[Tensor, Tensor]:
    if registration.through_reference(arguments[:5]):
        return reference.attention_decode_forward(*arguments)
    if registration.needs_gradient(arguments[:3]):
        return torch.ops.fused_lm.attention_decode_fwd.default(*arguments, backend)
    return registration.execute("attention_decode_fwd", *arguments, backend)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads(q, v_cache.shape[3]), q.new_empty(B, H, T, dtype=accumulator)


registration.implement("attention_decode_fwd", "attention_decode", "attention_decode_forward")
registration.register_fake("attention_decode_fwd", _fake)
registration.register_fake_of_cuda("attention_decode_fwd", _fake)
register_reference_gradient("attention_decode_fwd", reference.attention_decode_forward)
