"""Attention over other layouts: packed sequences of different lengths, and a KV cache.

These are the reference: correct everywhere, differentiable, one :func:`fused_lm.attention` call per
sequence or batch. The CUDA kernels that read the layouts in place take their place behind the same
names.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fused_lm.ops.attention import attention
from fused_lm.ops.attention_checks import checked_window
from fused_lm.ops.checks import check_same_device, shapes_of


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each of several sequences that lie packed one after the other.

    Args:
        q: [N, H, D], the queries of all sequences; k [M, Hkv, D]; v [M, Hkv, Dv].
        cu_seqlens_q: int [sequences + 1], where each begins and, last, where all end; starts with
            0, ends with N. cu_seqlens_k the same for k and v. Reading them waits for the device.
        causal, window, scale, softcap: As in :func:`fused_lm.attention`, per sequence.
        return_lse: Also return lse [H, N].
    Returns:
        [N, H, Dv], or (out, lse).
    Raises: ValueError on shape or value, TypeError on dtype or device mix.
    """
    if any(t.dim() != 3 for t in (q, k, v)):
        raise ValueError(
            f"attention_varlen takes [N, H, D] tensors, got {shapes_of(q=q, k=k, v=v)}"
        )
    check_same_device({"q": q, "k": k, "v": v})
    bounds_q = _checked_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_k = _checked_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"cu_seqlens_q names {len(bounds_q) - 1} sequences, cu_seqlens_k {len(bounds_k) - 1}"
        )
    outputs, statistics = [], []
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        result = attention(
            q[rows].transpose(0, 1).unsqueeze(0),
            k[keys].transpose(0, 1).unsqueeze(0),
            v[keys].transpose(0, 1).unsqueeze(0),
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            return_lse=return_lse,
        )
        out, *lse = result if isinstance(result, tuple) else (result,)
        outputs.append(out[0].transpose(0, 1))
        statistics += [statistic[0] for statistic in lse]
    if not outputs:
        outputs = [(q.sum() + k.sum() + v.sum()) * q.new_ones(0, q.shape[1], v.shape[2])]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        statistics = [q.new_empty(q.shape[1], 0, dtype=wide)]
    packed = torch.cat(outputs)
    return (packed, torch.cat(statistics, dim=1)) if return_lse else packed


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the newest T tokens of each sequence to its KV cache, causal from the end.

    Args:
        q: [B, H, T, D], T usually 1.
        k_cache: [B, Hkv, S, D], or paged [blocks, Hkv, block size, D]; v_cache the same with Dv.
        cache_lens: int [B], valid keys of each sequence, the T new ones included; what lies behind
            is ignored. At most S; it stays on the device, so a larger one is taken as S.
        block_table: int [B, most blocks]: block j of sequence b is ``k_cache[block_table[b, j]]``;
            entries behind a sequence's end must still name some block.
        window: (left, right) around each row's own position; nothing lies right of it, so right is
            0 or None.
        scale, softcap: As in :func:`fused_lm.attention`.
    Returns:
        [B, H, T, Dv]. Rows of a sequence shorter than T that precede its start are 0.
    Raises: ValueError on shape or value, TypeError on dtype or device mix.
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if any(t.dim() != 4 for t in tensors.values()):
        raise ValueError(f"attention_decode takes tensors of four dims, got {shapes_of(**tensors)}")
    check_same_device({**tensors, "cache_lens": cache_lens})
    if cache_lens.shape != (q.shape[0],) or cache_lens.is_floating_point():
        raise ValueError(
            f"cache_lens must be int [B], got {cache_lens.dtype} "
            + shapes_of(cache_lens=cache_lens, q=q)
        )
    left, right = (None, None) if window is None else checked_window(window)
    if right:
        raise ValueError(
            f"attention_decode sees nothing after a row: right must be 0, got {window}"
        )
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"block_table must be [B, blocks], got {shapes_of(block_table=block_table, q=q)}"
            )
        k_cache, v_cache = (_gathered(cache, block_table) for cache in (k_cache, v_cache))
    T, S = q.shape[2], k_cache.shape[2]
    key = torch.arange(S, device=q.device)
    row = cache_lens.clamp(max=S)[:, None] - T + torch.arange(T, device=q.device)
    visible = key <= row[..., None]
    if left is not None:
        visible = visible & (key >= row[..., None] - left)
    mask = visible[:, None]
    return cast(Tensor, attention(q, k_cache, v_cache, mask=mask, scale=scale, softcap=softcap))


def _gathered(cache: Tensor, block_table: Tensor) -> Tensor:
    """[blocks, Hkv, block size, D] -> [B, Hkv, most blocks * block size, D]."""
    return cache[block_table.long()].transpose(1, 2).flatten(2, 3)


def _checked_bounds(name: str, bounds: Tensor, total: int) -> list[int]:
    if bounds.dim() != 1 or bounds.numel() == 0 or bounds.is_floating_point():
        raise ValueError(
            f"{name} must be int [sequences + 1], got {bounds.dtype} {shapes_of(bounds=bounds)}"
        )
    values = bounds.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to {total}, got {values}")
    return values
