"""The masks of ``nn.MultiheadAttention`` in the dialect of :func:`fused_lm.attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lm.nn.stock_attention import Sizes, StockCall


class Masks(NamedTuple):
    """True = attend, floats are added."""

    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    causal: bool | str


def hint_replaces_mask(call: StockCall) -> bool:
    """torch's rule: only without weights and without key padding."""
    return call.is_causal and call.key_padding_mask is None and not call.need_weights


def translated(call: StockCall, sizes: Sizes, num_heads: int, extra_keys: int) -> Masks:
    """The masks of a call; none of the ``extra_keys`` behind the user's is hidden."""
    attn, padding = call.attn_mask, call.key_padding_mask
    if hint_replaces_mask(call):
        return Masks(None, None, None, "top_left")
    N, T, S = sizes
    if extra_keys:
        attn, padding = (m if m is None else F.pad(m, (0, extra_keys)) for m in (attn, padding))
        S += extra_keys
    mask, key_mask, bias = None, None, None
    if attn is not None:
        shaped = attn if attn.dim() == 2 else attn.reshape(N, num_heads, T, S)
        if attn.dtype == torch.bool:
            mask = ~shaped
        else:
            bias = shaped
    if padding is not None:
        keys = padding.view(N, S)
        if padding.dtype == torch.bool:
            key_mask = ~keys
        else:
            keys = keys[:, None, None, :]
            bias = keys if bias is None else bias + keys
    return Masks(mask, key_mask, bias, False)


def weights_of(q: Tensor, k: Tensor, masks: Masks) -> Tensor:
    """[N, H, T, S]: softmax of the scores by plain operators, zeros in rows without a key."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if masks.bias is not None:
        scores = scores + masks.bias
    if masks.mask is not None:
        scores = scores.masked_fill(~masks.mask, float("-inf"))
    if masks.key_mask is not None:
        scores = scores.masked_fill(~masks.key_mask[:, None, None, :], float("-inf"))
    if masks.causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    hidden = torch.isneginf(scores).all(-1, keepdim=True)
    return F.softmax(scores.masked_fill(hidden, 0.0), -1).masked_fill(hidden, 0.0)
