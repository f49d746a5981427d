"""torch's ``scaled_dot_product_attention``, signature and meaning, on
:func:`fused_lm.attention`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fused_lm.ops.attention import attention
from fused_lm.ops.checks import shapes_of


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [..., H, T, D]; key [..., Hkv, S, D]; value [..., Hkv, S, Dv]; as few dims as [T, D].
            Leading dims broadcast against each other.
        attn_mask: bool (True = attend) or float (added), broadcastable to [..., H, T, S].
        is_causal: Row t sees keys up to t, also where T != S (``causal="top_left"``).
        enable_gqa: Allows Hkv to divide H.
    Returns:
        [..., H, T, Dv]. Rows without a visible key are 0.
    Raises: ValueError on shape or value, TypeError on dtype or device mix.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention takes attn_mask or is_causal, not both")
    tensors = (query, key, value)
    if any(t.dim() < 2 for t in tensors):
        raise ValueError(
            f"expected at least [T, D], got {shapes_of(query=query, key=key, value=value)}"
        )
    q, k, v = (t[(None,) * (4 - t.dim())] if t.dim() < 4 else t for t in tensors)
    if not enable_gqa and k.shape[-3] != q.shape[-3] and 1 not in (k.shape[-3], q.shape[-3]):
        raise ValueError(
            f"heads differ and enable_gqa is False: {shapes_of(query=query, key=key, value=value)}"
        )
    heads = None if enable_gqa else torch.broadcast_shapes(*(t.shape[-3:-2] for t in (q, k, v)))
    lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
    if heads is not None:
        q, k, v = (t.expand(*t.shape[:-3], *heads, *t.shape[-2:]) for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-3:]).flatten(0, -4) for t in (q, k, v))
    mask, bias = _mask_and_bias(attn_mask, lead, q, k)
    result = attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal="top_left" if is_causal else False,
        scale=scale,
        dropout_p=dropout_p,
    )
    out = cast(Tensor, result)
    out = out.unflatten(0, lead) if len(lead) != 1 else out
    most = max(t.dim() for t in tensors)
    return out if most >= 4 else out.reshape(out.shape[4 - most :])


def _mask_and_bias(
    attn_mask: Tensor | None, lead: torch.Size, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A mask of more than four dims is flattened like q; a broadcast one stays broadcast."""
    if attn_mask is None:
        return None, None
    if len(lead) > 1 and attn_mask.dim() > 3:
        tail = attn_mask.shape[-3:]
        attn_mask = attn_mask.expand(*lead, *tail).reshape(-1, *tail)
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    return None, attn_mask
