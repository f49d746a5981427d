"""``attention`` and ``attention_weights``: the public functions and the way of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from fused_lm import dispatch
from fused_lm.ops import attention_backends as attention_backends  # fills the table
from fused_lm.ops import registration
from fused_lm.ops.attention_checks import (
    AttentionCall,
    AttentionWeightsCall,
    checked_call,
    checked_weights_call,
)
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import attention as pytorch_attention
from fused_lm.reference import attention as reference
from fused_lm.reference.layout import empty_heads


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, fused: ``softmax(q k^T * scale + bias) v`` without storing the T x S
    matrix.

    Args:
        q: [B, H, T, D] bf16 | fp16 | fp32 | fp64, any strides (a last dim that isn't contiguous is
            copied).
        k: [B, Hkv, S, D], dtype of q; Hkv divides H (grouped-query attention).
        v: [B, Hkv, S, Dv], dtype of q.
        mask: bool, broadcastable to [B, H, T, S]; True = attend.
        key_mask: bool [B, S]; True = attend.
        bias: float, broadcastable to [B, H, T, S]; added to the scores, has a gradient. To hide a
            key use a mask or -inf: where a row has nothing but -1e9, lse rounds to that, and
            gradients of the row are off by the number of its keys.
        causal: False, ``"top_left"`` (row t sees keys up to t, torch's ``is_causal``) or
            ``"bottom_right"`` (up to t + S - T, FlashAttention); True where T == S and both agree.
        window: (left, right), inclusive, None = unbounded: row t sees keys t - left .. t + right
            around the causal diagonal (bottom-right where ``causal`` is False and T != S).
        scale: Multiplies q.k before the softmax. Default ``D ** -0.5``.
        softcap: c > 0 turns each scaled score x into ``c * tanh(x / c)`` before bias and masks.
        dropout_p: Probability to drop a weight, in [0, 1].
        rng: int64 [4] from :func:`fused_lm.make_rng` to fix the dropout mask; drawn if a kernel
            needs it.
        return_lse: Also return the log-sum-exp of the scores; it can be differentiated.
    Returns:
        [B, H, T, Dv], dtype of q and, from the kernels, its memory order: heads of a packed
        projection give rows that lie as [B, T, H, Dv]. With ``return_lse``: also lse [B, H, T]
        fp32 (fp64 for fp64), natural log. Rows without a visible key are 0 with lse = -inf and
        zero gradients, never NaN.
    Accuracy: |err| <= 2 x the error of the same-dtype torch reference (fused_lm/tolerance.py). In
        fp16 gradients of scores overflow above 65504, as PyTorch's flash kernel's do, and not its
        math backend's: lower the loss scale.
        The kernels repeat bitwise, but for dq on a Hopper GPU: there blocks add to it in any order,
        unless ``torch.use_deterministic_algorithms(True)`` is set.
    Memory: 4*B*H*T bytes beyond the output in the kernels; on a Hopper GPU the backward takes 4*D
        bytes more per row, D being the compiled head dim, and for bits that repeat n times as much,
        at most 2 GiB more: enough for n*B*Hkv blocks to fill the GPU. The reference stores the T x
        S matrix.
    Backends: cuda (Ampere and later; 16 bits, head dims that are multiples of 8 up to 256), triton
        (Ampere and later), pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Dao 2023 (arXiv:2307.08691) alg. 1; Milakov & Gimelshein 2018 (arXiv:1805.02867).
    """
    call = checked_call(
        q, k, v, mask, key_mask, bias, causal, window, scale, softcap, dropout_p, rng, return_lse
    )
    backend = dispatch.choose("attention", call)
    if backend == "pytorch":
        return pytorch_attention.attention(
            q, k, v, call.mask, key_mask, call.bias, call.lower, call.upper, call.scale, dropout_p
        )
    if dropout_p > 0.0 and rng is None:
        call = call._replace(rng=registration.make_rng(q.device))
    # The commonest tensors need neither a cast nor a copy, and eager users pay for each step.
    plain = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    operands: tuple[Any, ...] = call[:-1]
    if not plain or _is_any_autocast_enabled():
        operands = as_operands(call[:3]) + call[3:-1]
    out, lse = _run(operands, backend)
    return (out, lse) if return_lse else out


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    average_heads: bool = True,
) -> Tensor:
    """The weights that :func:`attention` multiplied v with, by a second pass from its ``lse``.

    Args:
        q, k, mask, key_mask, bias, causal, window, scale, softcap: As given to :func:`attention`.
        lse: [B, H, T], as it returned it.
        dropout_p, rng: As given to it; with dropout, ``rng`` is required (else the mask would be
            another).
        average_heads: Mean over heads, which never builds [B, H, T, S].
    Returns:
        [B, T, S], or [B, H, T, S] without averaging, dtype of q; after dropout, as
        ``nn.MultiheadAttention`` returns them. Rows without a visible key are 0.
    Gradients go through the reference.   Backends: cuda, triton, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    """
    call = checked_weights_call(
        q,
        k,
        lse,
        mask,
        key_mask,
        bias,
        causal,
        window,
        scale,
        softcap,
        dropout_p,
        rng,
        average_heads,
    )
    backend = dispatch.choose("attention_weights", call)
    q, k = as_operands((call.q, call.k))
    call = call._replace(q=q, k=k)
    differentiable = (call.q, call.k, call.lse, call.bias)
    if registration.through_reference(differentiable):
        return reference.attention_weights_forward(*call)
    if registration.needs_gradient(differentiable):
        return torch.ops.fused_lm.attention_weights_fwd.default(*call, backend)
    return registration.execute("attention_weights_fwd", *call, backend)


def as_operands(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One dtype under autocast, and the one place that copies: kernels read the rows of a head as
    they lie, with any other stride.
    """
    if _is_any_autocast_enabled():
        dtype = registration.autocast_dtype(tensors[0].device)
        if dtype is not None and tensors[0].dtype != torch.float64:
            tensors = tuple(t.to(dtype) for t in tensors)
    for t in tensors:
        if not t.is_contiguous() and t.stride(-1) != 1:
            return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    return tensors


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    return output


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the 13 inputs: q, k, v and bias have one."""
    nothing: tuple[None, ...] = (None,) * 7
    q, k, v, mask, key_mask, bias, rng, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None, None, None, None, None, None, *nothing)
    if dout is None:
        dout = torch.zeros_like(out)
    *options, backend = ctx.options
    needs_dbias = any(ctx.needs_input_grad[5:6])
    arguments = (dout, dlse, q, k, v, out, lse, mask, key_mask, bias, rng, *options, needs_dbias)
    dq, dk, dv, dbias = registration.run_backward("attention_bwd", *arguments, backend)
    return (dq, dk, dv, None, None, dbias if needs_dbias else None, *nothing)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads(q, v.shape[3]), q.new_empty(B, H, T, dtype=accumulator)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, needs_dbias = rest[4], rest[-2]
    dbias = bias.new_empty(bias.shape) if needs_dbias else q.new_empty(0)
    dq, dk, dv = (empty_heads(t, t.shape[3]) for t in (q, k, v))
    return dq, dk, dv, dbias


def _fake_weights(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    B, H, T, _ = q.shape
    average_heads = rest[-2]
    return q.new_empty((B, T, k.shape[2]) if average_heads else (B, H, T, k.shape[2]))


registration.implement("attention_fwd", "attention", "attention_forward")
registration.implement("attention_bwd", "attention", "attention_backward")
registration.implement("attention_weights_fwd", "attention", "attention_weights_forward")
registration.register_fake("attention_fwd", _fake_forward)
registration.register_fake("attention_bwd", _fake_backward)
registration.register_fake("attention_weights_fwd", _fake_weights)
registration.register_fake_of_cuda("attention_fwd", _fake_forward)
registration.register_fake_of_cuda("attention_bwd", _fake_backward)
registration.register_fake(
    "cuda_attention_bwd_sm90", lambda *arguments: _fake_backward(*arguments[:-1], "cuda")
)
registration.register_fake_of_cuda("attention_weights_fwd", _fake_weights)
registration.register_autograd("attention_fwd", _backward, _setup_context)
_run = registration.route(
    "attention_fwd", 7, reference.attention_forward, _setup_context, _backward
)
register_reference_gradient("attention_bwd", reference.attention_backward)
register_reference_gradient("attention_weights_fwd", reference.attention_weights_forward)
__all__ = ["AttentionCall", "AttentionWeightsCall", "attention", "attention_weights"]
