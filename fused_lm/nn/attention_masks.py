"""The masks of ``nn.MultiheadAttention`` in the dialect of :func:`fused_lm.attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lm.nn.stock_attention import Sizes, has_values
from fused_lm.nn.stock_paths import StockCall

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


class SortedMasks(NamedTuple):
    """The masks of a call as they came, by what a kernel does with them; of ``mask`` and ``bias``
    one at the most, of ``key_mask`` and ``key_bias`` too.
    """

    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    key_bias: Tensor | None
    causal: bool


def sorted_masks(call: StockCall, extra_keys: int) -> SortedMasks:
    """Which of a call's masks hides and which is added; none that is causal and nothing else."""
    causal = is_causal_call(call, extra_keys)
    mask, bias = _by_kind(None if causal else call.attn_mask)
    key_mask, key_bias = _by_kind(call.key_padding_mask)
    return SortedMasks(mask, key_mask, bias, key_bias, causal)


def _by_kind(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(bool, float), of which one is None."""
    hides = mask is not None and mask.dtype == torch.bool
    return (mask, None) if hides else (None, mask)


def translated(call: StockCall, sizes: Sizes, num_heads: int, extra_keys: int) -> Masks:
    """The masks of a call; none of the ``extra_keys`` behind the user's is hidden."""
    N, T, S = sizes
    found = sorted_masks(call, extra_keys)

    def padded(mask: Tensor) -> Tensor:
        return F.pad(mask, (0, extra_keys)) if extra_keys else mask

    def per_row(mask: Tensor) -> Tensor:
        mask = padded(mask)
        return mask if mask.dim() == 2 else mask.reshape(N, num_heads, T, S + extra_keys)

    mask = None if found.mask is None else ~per_row(found.mask)
    key_mask = None if found.key_mask is None else ~padded(found.key_mask.view(N, S))
    bias = None if found.bias is None else per_row(found.bias)
    if found.key_bias is not None:
        keys = padded(found.key_bias.view(N, S))[:, None, None, :]
        bias = keys if bias is None else bias + keys
    return Masks(mask, key_mask, bias, "top_left" if found.causal else False)


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
