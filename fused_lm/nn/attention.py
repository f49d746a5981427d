"""MultiheadAttention: torch's module with the fused operator inside.

What is fused: batched or unbatched input, self- and cross-attention, ``kdim``/``vdim``, boolean and
    float
masks of every shape, both merged without an [N*H, T, S] tensor that the user did not pass, the
causal hint, dropout, returned weights (a second pass from ``lse``). What is delegated to torch's
own code: ``bias_k``/``bias_v``, ``add_zero_attn``, NestedTensors, and every call for which dispatch
    would run PyTorch's
operators anyway: its results are then torch's to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lm import dispatch
from fused_lm.explain import call_of
from fused_lm.ops.attention import attention, attention_weights
from fused_lm.ops.registration import autocast_dtype, make_rng, needs_gradient


class _Masks(NamedTuple):
    """torch's masks in the operator's dialect: True = attend, floats are added."""

    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    causal: bool | str


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for ``torch.nn.MultiheadAttention``: same constructor, parameters, ``state_dict``,
    results.

    Rows whose keys are all masked give the output of a zero vector on the fused path, never NaN.

    >>> attention = fused_lm.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> out, weights = attention(x, x, x, key_padding_mask=padding)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and meaning of torch's ``MultiheadAttention.forward``.

        Returns:
            (out, weights): out shaped like query; weights [N, T, S] averaged over heads, [N, H, T,
            S] otherwise, after dropout, or None unless ``need_weights``.
        """
        if self._fuses(query, key, value, key_padding_mask, attn_mask, is_causal, need_weights):
            return self._fused(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _fuses(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> bool:
        """Whether the call is one that is fused and a kernel would take it; torch judges odd
        input.
        """
        forced = dispatch.current_backend()
        if forced == "pytorch" or (forced == "auto" and query.device.type == "cpu"):
            return False
        if self.bias_k is not None or self.add_zero_attn:
            return False
        if any(t.is_nested for t in (query, key, value)):
            return False
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return False
        if not self._masks_fit(query, key, key_padding_mask, attn_mask, is_causal):
            return False
        if forced != "auto":
            return True
        q, k = self._stand_ins(query, key)
        masks = self._translated(q, k, key_padding_mask, attn_mask, need_weights, is_causal)
        return self._kernels_have_records(q, k, masks, need_weights)

    def _masks_fit(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Shapes and dtypes torch would accept; it raises its own errors for the rest."""
        batched = query.dim() == 3
        length = 1 if self.batch_first and batched else 0
        T, S = query.shape[length], key.shape[length]
        N = query.shape[1 - length] if batched else 1
        if is_causal and attn_mask is None:
            return False
        if attn_mask is not None:
            if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
                return False
            if attn_mask.shape not in ((T, S), (N * self.num_heads, T, S)):
                return False
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
                return False
            if key_padding_mask.shape != ((N, S) if batched else (S,)):
                return False
        return True

    def _stand_ins(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors without memory that look to dispatch like the projected query and key."""
        batched = query.dim() == 3
        length = 1 if self.batch_first and batched else 0
        N = query.shape[1 - length] if batched else 1
        one = torch.empty(
            (), dtype=autocast_dtype(query.device) or query.dtype, device=query.device
        )
        one.requires_grad_(needs_gradient((query, key, *self.parameters())))
        q, k = (one.expand(N, self.num_heads, t.shape[length], self.head_dim) for t in (query, key))
        return q, k

    def _kernels_have_records(
        self, q: Tensor, k: Tensor, masks: _Masks, need_weights: bool
    ) -> bool:
        """Under auto: would dispatch take a kernel for everything this call needs?"""
        options = {**masks._asdict(), "dropout_p": self.dropout if self.training else 0.0}
        calls = [("attention", {"q": q, "k": k, "v": k, "return_lse": need_weights, **options})]
        if need_weights:
            rng = q.new_empty(4, dtype=torch.int64)
            lse = q.new_empty(()).float().expand(q.shape[:3])
            calls.append(("attention_weights", {"q": q, "k": k, "lse": lse, "rng": rng, **options}))
        return all(
            dispatch.choose(op, call_of(op, **arguments)) not in ("pytorch", "reference")
            for op, arguments in calls
        )

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        packed = query is key and key is value and self._qkv_same_embed_dim
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value, packed)
        masks = self._translated(q, k, key_padding_mask, attn_mask, need_weights, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        options = {
            **masks._asdict(),
            "dropout_p": dropout_p,
            "rng": make_rng(q.device) if dropout_p > 0.0 else None,
        }
        result = attention(q, k, v, return_lse=need_weights, **options)
        weights = None
        if need_weights:
            out, lse = result
            weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **options)
        else:
            out = result
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, packed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T, E], [N, S, kdim], [N, S, vdim] -> q, k, v as [N, H, T or S, head_dim] views.

        ``packed``: all three are one tensor, projected by one product.
        """
        E = self.embed_dim
        if packed:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(E, -1)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.split(E)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(E)
            parts = tuple(
                F.linear(t, weight, bias)
                for t, weight, bias in zip((query, key, value), weights, biases, strict=True)
            )
        heads = (self.num_heads, self.head_dim)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in parts)
        return q, k, v

    def _translated(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> _Masks:
        """torch's rule: the hint replaces the mask only without weights and without key padding."""
        N, H, T, _ = q.shape
        S = k.shape[2]
        if is_causal and key_padding_mask is None and not need_weights:
            return _Masks(None, None, None, "top_left")
        mask, key_mask, bias = None, None, None
        if attn_mask is not None:
            shaped = attn_mask if attn_mask.dim() == 2 else attn_mask.view(N, H, T, S)
            if attn_mask.dtype == torch.bool:
                mask = ~shaped
            else:
                bias = shaped
        if key_padding_mask is not None:
            padding = key_padding_mask.view(N, S)
            if padding.dtype == torch.bool:
                key_mask = ~padding
            elif bias is None:
                bias = padding[:, None, None, :]
            else:
                bias = bias + padding[:, None, None, :]
        return _Masks(mask, key_mask, bias, False)
