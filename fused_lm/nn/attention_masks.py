"""The masks of ``nn.MultiheadAttention`` in the dialect of :func:`fused_lm.attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lm.nn.stock_attention import Sizes, StockCall, has_values

NOTE = "_fused_lm_causal"
"""Attribute of a mask: what it was when it was looked at, and whether it is the causal one."""


class Masks(NamedTuple):
    """True = attend, floats are added."""

    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    causal: bool | str


def is_causal_call(call: StockCall, extra_keys: int) -> bool:
    """Whether a call is causal and its mask says nothing else.

    torch's rule is that the hint replaces the mask without weights and key padding, and is ignored
    with either. There the hint is a reason to look whether it is true: a kernel told of causality
    skips half of the work and reads no mask. Keys that the module appends stand after all rows, but
    a mask doesn't hide them.
    """
    if not call.is_causal or call.attn_mask is None:
        return False
    if call.key_padding_mask is None and not call.need_weights:
        return True
    return extra_keys == 0 and hides_the_future(call.attn_mask)


def hides_the_future(mask: Tensor) -> bool:
    """Whether an attention mask hides exactly the keys after each row. It is looked at once, which
    on a GPU waits for it, and noted on the tensor; never where a graph is made.
    """
    if mask.dim() != 2 or mask.requires_grad or mask.is_inference() or not has_values():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    state = (id(mask), mask._version)  # a copy takes the note with it
    noted: Any = getattr(mask, NOTE, None)
    if noted is None or noted[0] != state:
        future = torch.ones_like(mask, dtype=torch.bool).triu(1)
        if mask.dtype != torch.bool:
            future = torch.zeros_like(mask).masked_fill(future, float("-inf"))
        noted = (state, torch.equal(mask, future))
        setattr(mask, NOTE, noted)
    return noted[1]


def translated(call: StockCall, sizes: Sizes, num_heads: int, extra_keys: int) -> Masks:
    """The masks of a call; none of the ``extra_keys`` behind the user's is hidden."""
    attn, padding = call.attn_mask, call.key_padding_mask
    causal = is_causal_call(call, extra_keys)
    attn = None if causal else attn
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
    return Masks(mask, key_mask, bias, "top_left" if causal else False)


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
