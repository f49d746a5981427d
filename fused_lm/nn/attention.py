"""MultiheadAttention: torch's module with the fused operator inside.

Fused: batched or unbatched input, self- and cross-attention, ``kdim``/``vdim``, ``bias_k``/
``bias_v``, ``add_zero_attn``, boolean and float masks of every shape, the causal hint, dropout, and
returned weights by a second pass from ``lse``. No [N*H, T, S] tensor is built that the user did not
pass: a boolean mask stays one, an attention mask and a key padding mask go to the kernel side by
side. Only two *float* masks have to be added first, [N, 1, T, S] (or the size of a 3-D mask), and
``bias_k`` and ``add_zero_attn`` make k, v and masks longer by a copy.

Delegated to torch's own forward (:mod:`fused_lm.nn.stock_attention`): NestedTensors, what torch
raises an error for, and every call for which dispatch would run PyTorch's operators anyway. Its
results are then torch's to the last bit, the native fast path included.

Rows without a visible key are zeros before the output projection, on every path. torch has three
answers: zeros in training without weights, NaN with weights, NaN in its fast path.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lm import dispatch
from fused_lm.nn.attention_masks import Masks, sorted_masks, translated, weights_of
from fused_lm.nn.dropin import (
    TYPICAL_TOKENS,
    DropIn,
    backend_of,
    stand_in,
    stays_stock,
)
from fused_lm.nn.stock_attention import (
    Sizes,
    can_be_nan,
    sizes_of,
    stock_forward,
    warn_of_mixed_masks,
)
from fused_lm.nn.stock_paths import StockCall
from fused_lm.ops.attention import (
    AttentionCall,
    AttentionWeightsCall,
    attention,
    attention_weights,
)
from fused_lm.ops.registration import autocast_dtype, make_rng, needs_gradient


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    """Drop-in for ``torch.nn.MultiheadAttention``: same constructor, parameters, ``state_dict``,
    results, errors.

    Args:
        strict_nan: Keep torch's NaN for rows whose keys are all masked, by leaving every masked
            call that could have them to torch. The other arguments are torch's.

    >>> attention = fused_lm.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> out, weights = attention(x, x, x, key_padding_mask=padding)
    """

    stock: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    kind: ClassVar[str] = "attention"
    strict_nan: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_nan: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        if strict_nan:  # else the class speaks: a module that was changed in place has no state
            self.strict_nan = True

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
        call = StockCall(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal,
        )  # fmt: skip
        sizes = None if stays_stock(query) else self._fusable(call)
        return stock_forward(self, call) if sizes is None else self.by_operators(call, sizes)

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`, for unmasked self-attention without weights."""
        x = stand_in((1, tokens, self.embed_dim), self.out_proj.weight)
        call = StockCall(x, x, x, None, False, None, True, False)
        q, k = self._stand_ins(call, Sizes(1, tokens, tokens))
        return backend_of("attention", q, k, k, dropout_p=self._dropout_p)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _fusable(self, call: StockCall) -> Sizes | None:
        """The sizes of a call that kernels take as a whole, else None; torch judges odd input."""
        sizes = sizes_of(self, call)
        if sizes is None or (call.is_causal and call.attn_mask is None):
            return None
        if self.strict_nan and can_be_nan(self, call):
            return None
        if dispatch.current_backend() == "auto" and not self._kernels_have_records(call, sizes):
            return None
        return sizes

    def _kernels_have_records(self, call: StockCall, sizes: Sizes) -> bool:
        """Under auto: would dispatch take a kernel for everything this call needs?"""
        # Masks as they came: only what kind they are of matters here.
        found = sorted_masks(call, self._extra_keys)
        options: dict[str, Any] = {
            "mask": found.mask,
            "key_mask": found.key_mask,
            "bias": found.key_bias if found.bias is None else found.bias,
            "rng": None,
            "lower": None,
            "upper": 0 if found.causal else None,
            "scale": self.head_dim**-0.5,
            "softcap": 0.0,
            "dropout_p": self._dropout_p,
        }
        q, k = self._stand_ins(call, sizes)
        asked: Any = AttentionCall(q=q, k=k, v=k, **options, return_lse=call.need_weights)
        if dispatch.choose("attention", asked) in ("pytorch", "reference"):
            return False
        if not call.need_weights:
            return True
        lse = torch.empty((), device=q.device).expand(q.shape[:3])
        asked = AttentionWeightsCall(
            q=q, k=k, lse=lse, **options, average_heads=call.average_attn_weights
        )
        return dispatch.choose("attention_weights", asked) not in ("pytorch", "reference")

    def _stand_ins(self, call: StockCall, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Tensors without memory that look to dispatch like the projected query and key."""
        query = call.query
        one = torch.empty(
            (), dtype=autocast_dtype(query.device) or query.dtype, device=query.device
        )
        own = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        learned = (*own, self.in_proj_bias, self.bias_k, self.bias_v)
        if needs_gradient((query, call.key, call.value, *learned)):
            one.requires_grad_()
        heads = (sizes.N, self.num_heads)
        q = one.expand(*heads, sizes.T, self.head_dim)
        return q, one.expand(*heads, sizes.S + self._extra_keys, self.head_dim)

    @property
    def _extra_keys(self) -> int:
        """Keys that the module itself appends to the user's."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def by_operators(self, call: StockCall, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
        """The call on :func:`fused_lm.attention`, whatever that runs on."""
        warn_of_mixed_masks(call)
        q, k, v = self._with_extra_keys(*self._projected(call))
        options: dict[str, Any] = {
            **self._translated(call, sizes)._asdict(),
            "dropout_p": self._dropout_p,
            "rng": make_rng(q.device) if self._dropout_p > 0.0 else None,
        }
        result: Any = attention(q, k, v, return_lse=call.need_weights, **options)
        out, weights = result, None
        if call.need_weights:
            out, lse = result
            weights = attention_weights(
                q, k, lse, average_heads=call.average_attn_weights, **options
            )
        return self._joined(out, weights, call)

    def by_formula(self, call: StockCall, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
        """The call by plain operators, for graphs."""
        warn_of_mixed_masks(call)
        q, k, v = self._with_extra_keys(*self._projected(call))
        P = weights_of(q, k, self._translated(call, sizes))
        P = F.dropout(P, self._dropout_p) if self._dropout_p else P
        weights = None
        if call.need_weights:
            weights = P.mean(1) if call.average_attn_weights else P
        return self._joined(P @ v, weights, call)

    def _joined(
        self, out: Tensor, weights: Tensor | None, call: StockCall
    ) -> tuple[Tensor, Tensor | None]:
        """The results, from heads [N, H, T, head_dim]: contiguous in the layout of the query, which
        users' views count on. torch reads the projection's weight, so nobody's hook sees a call.
        """
        project = self.out_proj.weight, self.out_proj.bias
        if call.query.dim() == 3:
            order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
            return F.linear(out.permute(order).flatten(2), *project), weights
        out = F.linear(out.squeeze(0).transpose(0, 1).flatten(1), *project)
        return out, None if weights is None else weights.squeeze(0)

    def _projected(self, call: StockCall) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [N, H, T or S, head_dim] views; a tensor that is given twice is projected
        once.
        """
        query, key, value = call.query, call.key, call.value
        E, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                parts = F.linear(query, self.in_proj_weight, bias).split(E, -1)
            else:
                both = (E, 2 * E)
                q_weight, kv_weight = self.in_proj_weight.split(both)
                q_bias, kv_bias = (None, None) if bias is None else bias.split(both)
                kv = F.linear(key, kv_weight, kv_bias).split(E, -1)
                parts = (F.linear(query, q_weight, q_bias), *kv)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.split(E)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.split(E)
            tensors = zip((query, key, value), weights, biases, strict=True)
            parts = tuple(F.linear(t, weight, bias) for t, weight, bias in tensors)
        q, k, v = (self._heads(part) for part in parts)
        return q, k, v

    def _heads(self, rows: Tensor) -> Tensor:
        """[T, E], [N, T, E] or [T, N, E] -> [N, H, T, head_dim], a view."""
        heads = rows.unflatten(-1, (self.num_heads, self.head_dim))
        if rows.dim() == 2:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _with_extra_keys(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k and v with ``bias_k``, ``bias_v`` and the zero of ``add_zero_attn`` behind them."""
        if self._extra_keys == 0:
            return q, k, v
        N = k.shape[0]
        longer = []
        for rows, bias in ((k, self.bias_k), (v, self.bias_v)):
            parts = [rows]
            if bias is not None:
                learned = bias.to(rows.dtype).view(1, 1, self.num_heads, self.head_dim)
                parts.append(learned.transpose(1, 2).expand(N, -1, -1, -1))
            if self.add_zero_attn:
                parts.append(rows.new_zeros(N, self.num_heads, 1, self.head_dim))
            longer.append(torch.cat(parts, dim=2))
        return q, longer[0], longer[1]

    def _translated(self, call: StockCall, sizes: Sizes) -> Masks:
        return translated(call, sizes, self.num_heads, self._extra_keys)
