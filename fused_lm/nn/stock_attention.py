"""torch's own forward of ``nn.MultiheadAttention``, with zeros where it answers NaN.

A row whose keys are all masked is NaN in torch in two places: wherever weights are returned (the
softmax of a row of -inf, which turns every gradient into NaN too) and in the native fast path of
inference. Here such a row is zeros before the output projection, as torch's
``scaled_dot_product_attention`` answers it, and all other rows keep torch's bits:

- with weights, torch's functional form runs with another ``softmax``. It is torch's code, so that
  it follows torch from version to version.
- the fast path has no gradients, and its NaN stay in their rows, which are written over.

On a CPU it costs a look at the masks, and calls that hide no row run torch's code as it is. On a
GPU that look would be a synchronisation, under ``torch.func`` and tracers it can't be: there every
masked call that could be NaN takes the functional form, and while compiling, plain operators.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.nn import functional as F

from fused_lm.nn.stock_paths import StockCall, attention_is_native
from fused_lm.ops.checks import autocast_enabled


class Sizes(NamedTuple):
    """N batches of T queries and S keys."""

    N: int
    T: int
    S: int


def stock_forward(module: Any, call: StockCall) -> tuple[Tensor, Tensor | None]:
    """What our MultiheadAttention returns where torch's operators do the work.

    Raises:
        What ``nn.MultiheadAttention`` raises, where it does.
    """
    sizes = sizes_of(module, call)
    if module.strict_nan or sizes is None or not can_be_nan(module, call):
        return nn.MultiheadAttention.forward(module, *call)
    if is_compiling():  # Dynamo can't look into the functional form
        return module.by_formula(call, sizes)
    looks = may_look(call.query, call.attn_mask, call.key_padding_mask)
    hidden = rows_without_a_key(module, call, sizes) if looks else None
    if hidden is not None and not hidden.any():
        return nn.MultiheadAttention.forward(module, *call)
    safe_out, safe_weights = _functional_form(module, call)
    if not attention_is_native(module, call):
        return safe_out, safe_weights
    if hidden is None:
        return safe_out.contiguous(), safe_weights
    out, weights = nn.MultiheadAttention.forward(module, *call)
    rows = hidden.any(1).unsqueeze(-1)  # a 3-D mask may hide a row from some heads only
    out = torch.where(rows, safe_out, out).contiguous()
    if weights is not None and safe_weights is not None:
        rows = hidden.unsqueeze(-1) if weights.dim() == 4 else rows
        weights = torch.where(rows, safe_weights, weights)
    return out, weights


def can_be_nan(module: Any, call: StockCall) -> bool:
    """Whether torch's own forward could answer NaN: masks may hide a row, and no safe softmax is
    in the way.
    """
    if call.attn_mask is None and call.key_padding_mask is None:
        return False
    if module.bias_k is not None or module.add_zero_attn:  # a key that no mask hides
        return False
    return call.need_weights or attention_is_native(module, call)


def sizes_of(module: Any, call: StockCall) -> Sizes | None:
    """The sizes of a call, or None where its shapes and dtypes don't fit together: torch then
    raises an error of its own, or knows better.
    """
    query, key, value = call.query, call.key, call.value
    if query.is_nested or key.is_nested or value.is_nested:
        return None
    dtypes = {query.dtype, key.dtype, value.dtype, module.out_proj.weight.dtype}
    if len(dtypes) > 1 and not autocast_enabled(query.device):
        return None
    batched = query.dim() == 3
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        return None
    widths = (module.embed_dim, module.kdim, module.vdim)
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
        return None
    rows = 1 if module.batch_first and batched else 0
    T, S = query.shape[rows], key.shape[rows]
    N = query.shape[1 - rows] if batched else 1
    if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[1 - rows] != N):
        return None
    if (module.bias_k is None) != (module.bias_v is None):
        return None
    sizes = Sizes(N, T, S)
    padding_shape = (N, S) if batched else (S,)
    attn_shapes = ((T, S), (N * module.num_heads, T, S))
    fits = _mask_fits(call.key_padding_mask, (padding_shape,), query)
    return sizes if fits and _mask_fits(call.attn_mask, attn_shapes, query) else None


def _mask_fits(mask: Tensor | None, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> bool:
    if mask is None or mask.dtype == torch.bool:
        return mask is None or mask.shape in shapes
    # Autocast narrows a float mask with the rest of the call, but leaves fp64 as it is.
    same = mask.dtype == query.dtype or (
        autocast_enabled(query.device) and mask.dtype != torch.float64
    )
    return mask.is_floating_point() and same and mask.shape in shapes


def rows_without_a_key(module: Any, call: StockCall, sizes: Sizes) -> Tensor:
    """bool [N or 1, H or 1, T]: the rows whose keys are all masked."""
    N, T, S = sizes
    attn, padding = call.attn_mask, call.key_padding_mask
    if padding is not None:
        padding = padding.view(N, 1, S)
    if attn is None:
        assert padding is not None  # or nothing could be hidden: can_be_nan
        return _hides(padding).all(-1).unsqueeze(-1).expand(N, 1, T)
    per_head = attn.dim() == 3
    attn = attn.reshape(N, -1, T, S) if per_head else attn
    if padding is None:
        rows = _hides(attn).all(-1)
        return rows if per_head else rows.view(1, 1, T)
    if attn.dtype != torch.bool and padding.dtype != torch.bool:  # the sum may overflow to -inf
        return _hides((attn if per_head else attn.view(1, 1, T, S)) + padding.unsqueeze(1)).all(-1)
    if per_head:
        return (_hides(attn) | _hides(padding).unsqueeze(1)).all(-1)
    # Keys that both leave visible, counted by a product: no [N, T, S] tensor.
    return ((~_hides(padding)).float() @ (~_hides(attn)).float().t()) == 0.0


def _hides(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else torch.isneginf(mask)


def may_look(*tensors: Tensor | None) -> bool:
    """Whether Python may branch on values: on a GPU that waits for it."""
    return has_values() and all(t is None or t.device.type == "cpu" for t in tensors)


def has_values() -> bool:
    """Whether tensors have values: not where a graph is made, and under ``torch.func`` not one."""
    return not (
        is_compiling()
        or torch.jit.is_tracing()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
    )


def warn_of_mixed_masks(call: StockCall) -> None:
    """torch's own warning, in its own words, for masks of two dtypes."""
    attn, padding = call.attn_mask, call.key_padding_mask
    if attn is not None and padding is not None and attn.dtype != padding.dtype:
        names = ("key_padding_mask", attn.dtype, "attn_mask")
        F._canonical_mask(padding[..., :0], *names, call.query.dtype)


def _safe_softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax whose rows of -inf are zeros, with zero gradients; the same bits elsewhere."""
    hidden = torch.isneginf(scores).all(dim, keepdim=True)
    return F.softmax(scores.masked_fill(hidden, 0.0), dim).masked_fill(hidden, 0.0)


def _with_globals(function: Any, **names: Any) -> Any:
    """The same code looking some of its globals up in ``names``."""
    known = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    twin = FunctionType(
        function.__code__, {**known, **names}, function.__name__, function.__defaults__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


# Under a mode of torch functions, as torch.set_default_device sets one, it would call its own name.
_multi_head_attention = _with_globals(
    F.multi_head_attention_forward,
    softmax=_safe_softmax,
    has_torch_function=lambda tensors: False,
)


def _functional_form(module: Any, call: StockCall) -> tuple[Tensor, Tensor | None]:
    """torch's ``F.multi_head_attention_forward`` as its module calls it, without NaN."""
    query, key, value = call.query, call.key, call.value
    transposes = module.batch_first and query.dim() == 3
    if transposes:  # one tensor stays one: torch then projects it once
        views = {id(t): t.transpose(1, 0) for t in (query, key, value)}
        query, key, value = views[id(query)], views[id(key)], views[id(value)]
    out, weights = _multi_head_attention(
        query, key, value, module.embed_dim, module.num_heads,
        module.in_proj_weight, module.in_proj_bias, module.bias_k, module.bias_v,
        module.add_zero_attn, module.dropout, module.out_proj.weight, module.out_proj.bias,
        training=module.training,
        key_padding_mask=call.key_padding_mask,
        need_weights=call.need_weights,
        attn_mask=call.attn_mask,
        use_separate_proj_weight=not module._qkv_same_embed_dim,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
        average_attn_weights=call.average_attn_weights,
        is_causal=call.is_causal,
    )  # fmt: skip
    return out.transpose(1, 0) if transposes else out, weights
