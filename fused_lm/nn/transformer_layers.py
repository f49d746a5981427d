"""torch's TransformerEncoderLayer and TransformerDecoderLayer, fused inside.

What is fused of a layer, beside the attention that its MultiheadAttention fuses:

    norm(x + dropout(branch))          one operator; pre-norm keeps the sum too
    linear2(act(linear1(x)))           one operator where no dropout stands between, else two

A part that someone replaced, or listens to, is called as it is.

In inference stock's encoder layer takes a shortcut past its own submodules, one native operator.
Under ``auto`` it stays, because nobody has measured our kernels against it; a forced backend
doesn't take it. Two things differ then from the operator, where that is at odds with stock's own
slower way: an ``nn.GELU("tanh")`` is computed as that, and CPU autocast doesn't narrow the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lm import dispatch
from fused_lm.nn.attention import MultiheadAttention
from fused_lm.nn.dropin import (
    TYPICAL_TOKENS,
    DropIn,
    backend_of,
    is_plain_linear,
    is_untouched,
    offered,
    stand_in,
    stays_stock,
)
from fused_lm.nn.norm import LayerNorm, fused_add_norm
from fused_lm.nn.stock_attention import may_look, rows_without_a_key, sizes_of
from fused_lm.nn.stock_paths import StockCall, layer_is_native
from fused_lm.ops.ffn import ffn
from fused_lm.ops.linear_act import linear_act


def activation_name(activation: Any) -> str | None:
    """The name that :func:`fused_lm.ffn` knows an activation by, None if it doesn't.

    >>> activation_name(torch.nn.GELU(approximate="tanh"))
    'gelu_tanh'
    """
    if isinstance(activation, nn.Module) and not is_untouched(activation, *_MODULES):
        return None
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if isinstance(activation, nn.Module):
        return _MODULES[type(activation)]
    return next((name for known, name in _FUNCTIONS if activation is known), None)


_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))


class _Layer(DropIn):
    """What encoder and decoder layers share.

    Attributes:
        fuse_ffn: Whether the feed-forward network is one of ours; ``fuse(ffn=False)`` sets it on
            the instance.
    """

    kind: ClassVar[str] = "ffn"
    fuse_ffn: bool = True
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout
    activation: Callable[[Tensor], Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for child in self.__dict__["_modules"].values():
            for own in (MultiheadAttention, LayerNorm):
                if type(child) is own.stock:
                    child.__class__ = own

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`, of the feed-forward network."""
        up, down = self.linear1, self.linear2
        name = self._fusable_activation()
        if name is None or not (is_plain_linear(up) and is_plain_linear(down)):
            return "pytorch"
        x = stand_in((tokens, up.in_features), up.weight)
        return backend_of(
            "ffn", x, up.weight, down.weight, up_bias=up.bias, down_bias=down.bias, activation=name
        )

    def _fusable_activation(self) -> str | None:
        return activation_name(self.activation) if self.fuse_ffn and offered("ffn") else None

    def _feed_forward(self, x: Tensor) -> Tensor:
        """``linear2(dropout(activation(linear1(x))))``"""
        up, down, dropout = self.linear1, self.linear2, self.dropout
        name = self._fusable_activation()
        if name is None or not (is_plain_linear(up) and is_plain_linear(down)):
            return down(dropout(self.activation(up(x))))
        if is_untouched(dropout, nn.Dropout) and not (dropout.training and dropout.p):
            return ffn(
                x,
                up.weight,
                down.weight,
                up_bias=up.bias,
                down_bias=down.bias,
                activation=name,
                recompute=True,
            )
        hidden = dropout(linear_act(x, up.weight, up.bias, activation=name))
        return linear_act(hidden, down.weight, down.bias, activation="none")


def _add_norm(
    branch: Tensor, x: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``s = x + dropout(branch)``; returns (norm(s), s)."""
    if is_untouched(norm, LayerNorm) and is_untouched(dropout, nn.Dropout):
        fused: Any = norm
        if fused.normalized_shape == x.shape[-1:] and x.shape == branch.shape:
            dropout_p: Any = dropout.p if dropout.training else 0.0
            return fused_add_norm(fused, branch, x, dropout_p)
    s = x + dropout(branch)
    return norm(s), s


def torch_refuses(*masks: Tensor | None) -> bool:
    """Whether torch would refuse a mask's dtype, in words of its own."""
    return any(m is not None and m.dtype != torch.bool and not m.is_floating_point() for m in masks)


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """Drop-in for ``torch.nn.TransformerEncoderLayer``: same constructor, parameters,
    ``state_dict``, results; rows without a visible key get zeros from the attention, never NaN.
    """

    stock: ClassVar[type[nn.Module]] = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Arguments, shapes and meaning of torch's ``TransformerEncoderLayer.forward``."""
        masks = (src_mask, src_key_padding_mask)
        if src.is_nested or torch_refuses(*masks):
            return super().forward(src, *masks, is_causal)
        native = layer_is_native(self, src)
        auto = dispatch.current_backend() == "auto"
        if not (stays_stock(src) or (auto and native)):
            return self._by_parts(src, *masks, is_causal)
        sizes = self._sizes_if_nan(src, masks) if native and masks != (None, None) else None
        if sizes is None:
            return super().forward(src, *masks, is_causal)
        call = StockCall(src, src, src, src_key_padding_mask, False, src_mask, True, is_causal)
        if not may_look(src, *masks):
            return self._by_parts(src, *masks, is_causal)
        hidden = rows_without_a_key(self.self_attn, call, sizes)
        if not hidden.any():
            return super().forward(src, *masks, is_causal)
        safe = self._by_parts(src, *masks, is_causal)
        rows = hidden.any(1).unsqueeze(-1)
        return torch.where(rows, safe, super().forward(src, *masks, is_causal))

    def _sizes_if_nan(self, src: Tensor, masks: tuple[Tensor | None, Tensor | None]) -> Any:
        """The sizes of a call whose rows without a key are to be zeros; None: leave it to torch."""
        attention: Any = self.self_attn
        if getattr(attention, "strict_nan", True):  # torch's own class has no such attribute
            return None
        return sizes_of(attention, StockCall(src, src, src, masks[1], False, masks[0], True, False))

    def _by_parts(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The layer by its submodules and our operators, past stock's native operator."""

        def attend(rows: Tensor) -> Tensor:
            return _attended(self.self_attn, rows, rows, mask, padding, is_causal)

        if self.norm_first:
            hidden, x = _add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return x + self.dropout2(self._feed_forward(hidden))
        x, _ = _add_norm(attend(x), x, self.dropout1, self.norm1)
        return _add_norm(self._feed_forward(x), x, self.dropout2, self.norm2)[0]


def _attended(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    encoder: bool = True,
) -> Tensor:
    """What an attention makes of x. Modules of others may count on the float masks that stock's
    encoder layer hands them; its decoder layer hands on what it gets.
    """
    if encoder and type(attention) not in (nn.MultiheadAttention, MultiheadAttention):
        name, other = "src_key_padding_mask", F._none_or_dtype(mask)
        padding = F._canonical_mask(padding, name, other, "src_mask", x.dtype)
        mask = F._canonical_mask(mask, "src_mask", None, "", x.dtype, check_other=False)
    return attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False,
        is_causal=is_causal,
    )[0]  # fmt: skip


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """Drop-in for ``torch.nn.TransformerDecoderLayer``: same constructor, parameters,
    ``state_dict``, results.
    """

    stock: ClassVar[type[nn.Module]] = nn.TransformerDecoderLayer

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Arguments, shapes and meaning of torch's ``TransformerDecoderLayer.forward``."""
        if stays_stock(tgt):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip

        def attend(rows: Tensor) -> Tensor:
            masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            return _attended(self.self_attn, rows, rows, *masks, encoder=False)

        def look(rows: Tensor) -> Tensor:
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return _attended(self.multihead_attn, rows, memory, *masks, encoder=False)

        x = tgt
        if self.norm_first:
            hidden, x = _add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            hidden, x = _add_norm(look(hidden), x, self.dropout2, self.norm3)
            return x + self.dropout3(self._feed_forward(hidden))
        x, _ = _add_norm(attend(x), x, self.dropout1, self.norm1)
        x, _ = _add_norm(look(x), x, self.dropout2, self.norm2)
        return _add_norm(self._feed_forward(x), x, self.dropout3, self.norm3)[0]
