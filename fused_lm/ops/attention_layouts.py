"""Attention over packed sequences of different lengths.

This is the reference: correct everywhere, differentiable, one :func:`fused_lm.attention` call per
sequence. A CUDA kernel that reads the layout in place takes its place behind the same name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.ops.attention import attention
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


def _checked_bounds(name: str, bounds: Tensor, total: int) -> list[int]:
    if bounds.dim() != 1 or bounds.numel() == 0 or bounds.is_floating_point():
        raise ValueError(
            f"{name} must be int [sequences + 1], got {bounds.dtype} {shapes_of(bounds=bounds)}"
        )
    values = bounds.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to {total}, got {values}")
    return values
