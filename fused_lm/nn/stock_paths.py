"""Where torch leaves its modules' own forward in inference: what is asked before it, so that the
drop-ins keep the bits and the meaning of what torch does there.

The conditions are those of ``forward`` in ``torch.nn.MultiheadAttention``,
``TransformerEncoderLayer`` and ``TransformerEncoder``, torch 2.10 to 2.14; tests spy on the native
operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules import activation
from torch.overrides import has_torch_function

_DEVICES = ("cpu", "cuda")


class StockCall(NamedTuple):
    """Arguments of ``nn.MultiheadAttention.forward``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    average_attn_weights: bool
    is_causal: bool


def attention_is_native(module: Any, call: StockCall) -> bool:
    """Whether ``nn.MultiheadAttention`` runs a call as one native operator."""
    for mask in (call.attn_mask, call.key_padding_mask):
        if mask is not None and mask.is_floating_point():
            return False
    query = call.query
    own = (module.in_proj_weight, module.in_proj_bias)
    return (
        query is call.key
        and query is call.value
        and _attention_could_be(module, query)
        and query.dtype == own[0].dtype == own[1].dtype
        and not module.training
        and module.bias_k is None
        and not module.add_zero_attn
        and _runs_natively((query, *own, module.out_proj.weight, module.out_proj.bias))
        and not activation._is_make_fx_tracing()
    )


def layer_is_native(layer: Any, src: Tensor) -> bool:
    """Whether ``nn.TransformerEncoderLayer`` runs as one native operator, which takes float masks
    too.
    """
    attention = layer.self_attn
    return (
        isinstance(attention, torch.nn.MultiheadAttention)
        and not layer.training
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and _attention_could_be(attention, src)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
        and _runs_natively(_tensors_of(layer, src))
    )


def encoder_drops_padding(
    encoder: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> bool:
    """Whether ``nn.TransformerEncoder`` makes a NestedTensor without the padded tokens, if the
    padding is on the right.
    """
    first = encoder.layers[0]
    return (
        padding is not None
        and mask is None
        and src.dim() == 3
        and not first.training
        and getattr(encoder, "use_nested_tensor", False)
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled()
        and not (getattr(encoder, "mask_check", True) and is_compiling())
        and _runs_natively(_tensors_of(first, src))
    )


def _attention_could_be(module: Any, query: Tensor) -> bool:
    return (
        torch.backends.mha.get_fastpath_enabled()
        and query.dim() == 3
        and module.batch_first
        and module.num_heads % 2 == 0
        and module._qkv_same_embed_dim
        and module.in_proj_bias is not None
        and not torch.is_autocast_enabled()
    )


def _runs_natively(tensors: Iterable[Tensor | None]) -> bool:
    present = [t for t in tensors if t is not None]
    if has_torch_function(present) or any(t.device.type not in _DEVICES for t in present):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in present))


def _tensors_of(layer: Any, src: Tensor) -> list[Tensor | None]:
    """What torch looks at of a layer."""
    attention = layer.self_attn
    parts = (attention.out_proj, layer.norm1, layer.norm2, layer.linear1, layer.linear2)
    own = [t for part in parts for t in (part.weight, part.bias)]
    return [src, attention.in_proj_weight, attention.in_proj_bias, *own]
