"""``linear_act``: the public function and the way of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.linear_checks import LinearActCall, checked_linear_act
from fused_lm.ops.norm_input import NormInput, checked_norm_input, keep, restore
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import linear_act as pytorch_linear
from fused_lm.reference import linear_act as reference
from fused_lm.reference.linear_act import keeps_pre


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    transposed: bool = False,
    weight_grad: Tensor | None = None,
    x_norm: NormInput | None = None,
) -> Tensor:
    """A linear layer and its activation in one kernel: ``act(x W^T + b)``.

    Args:
        x: [..., C] bf16 | fp16 | fp32 | fp64, any strides.
        weight: [F, C], dtype of x (under autocast mixed, as torch's linear takes it). For a gated
            activation [2F, C], gates first.
        bias: [F] (gated: [2F]) or None.
        activation: gelu | gelu_tanh | relu | relu_squared | silu | swiglu | geglu | geglu_tanh |
            none.
        transposed: The weight is [C, F], as GPT-2's Conv1D keeps it; nothing is transposed.
        weight_grad: Shape of the weight, any float dtype. The backward adds the weight's gradient
            into it, in fp32 and rounded once, and autograd gets none: for gradient accumulation,
            an fp32 ``weight_grad`` loses nothing to a 16-bit sum. Any backward through this call
            adds, one that asks only for the gradient of x too; hooks of DDP, FSDP and a GradScaler
            don't see it. No second derivatives, no ``torch.func``.
        x_norm: The norm that made x (:class:`fused_lm.NormInput`), to run it again in the backward
            instead of keeping x. Ignored by PyTorch's backend, by compilers, and where x is no
            longer the tensor that the norm returned.
    Returns:
        [..., F], dtype of x (autocast's, under autocast).
    Accuracy: |err| <= 2 x the error of the same-dtype torch reference. Sums are fp32, but for
        Triton's dx, which is torch's own product.
    Memory: saves x (with ``x_norm`` nothing new) and the pre-activation (for relu the output).
    Backends: cuda (16-bit, widths that are multiples of 8), triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202).
    """
    call = checked_linear_act(x, weight, bias, weight_grad, activation, transposed)
    x_norm = checked_norm_input(x_norm, x)
    backend = dispatch.choose("linear_act", call)
    if backend == "pytorch":
        return pytorch_linear.linear_act(x, weight, bias, activation, transposed)
    return _run(_arguments(call), backend, x_norm)[0]


def _arguments(call: LinearActCall) -> tuple[Any, ...]:
    x, weight, bias = cast_for_autocast(call.x, call.weight, call.bias)
    keep_pre = keeps_pre(call.activation) and registration.needs_gradient((x, weight, bias))
    return x, weight, bias, call.weight_grad, call.activation, call.transposed, keep_pre


def cast_for_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """All in autocast's dtype, where it is on."""
    dtype = registration.autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return (x, *tensors)
    return tuple(None if t is None else t.to(dtype) for t in (x, *tensors))


def by_rows(forward: Callable[..., Any], x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Runs a forward on rows [N, C] and gives y the leading dims of x again."""
    y, *saved = forward(rows_of(x), *rest)
    # A view that an autograd.Function returns can't be changed in place; this is none.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])), *saved


def rows_of(t: Tensor) -> Tensor:
    """[..., C] as [N, C]; C may be 0."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    x, weight, bias, ctx.weight_grad, activation, transposed, _, backend = inputs
    y, pre = output
    pre = y if activation == "relu" else pre
    # weight_grad is written, not read: as a saved tensor it could be a copy, or of an old version.
    ctx.save_for_backward(weight, bias, pre, *keep(ctx, x))
    ctx.options = (activation, transposed, backend)
    return (y,)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the 8 inputs: x, weight and bias have one."""
    weight, bias, pre, x, norm_weight, norm_bias = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    activation, transposed, backend = ctx.options
    x = restore(ctx.kept, x, norm_weight, norm_bias, backend)
    needs_dx, needs_dweight, needs_dbias = (any(ctx.needs_input_grad[i : i + 1]) for i in range(3))
    pre = rows_of(pre) if activation == "relu" else pre
    rows = (rows_of(dy), rows_of(x))
    tensors = (*rows, weight, bias, pre, activation, transposed, needs_dx, needs_dbias)
    if ctx.weight_grad is not None and needs_dweight:
        dx, _, dbias = registration.run_backward(
            "linear_act_bwd_add", *tensors, False, ctx.weight_grad, backend, differentiable=False
        )
        needs_dweight, dweight = False, None
    else:
        dx, dweight, dbias = registration.run_backward(
            "linear_act_bwd", *tensors, needs_dweight, backend
        )
    return (
        dx.view(x.shape) if needs_dx else None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
        *(None,) * 5,
    )


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = weight.shape[1 if transposed else 0]
    y = x.new_empty(x.shape[0], reference.hidden_width(out, activation))
    return y, x.new_empty((x.shape[0], out) if keep_pre else (0,))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        torch.empty_like(weight) if needs_dweight else weight.new_empty(0),
        bias.new_empty(bias.shape) if needs_dbias and bias is not None else dy.new_empty(0),
    )


def _fake_backward_add(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, backend = arguments
    return _fake_backward(*(*tensors, backend))


def reference_of(function: Callable[..., Any], *gradients: int) -> Callable[..., Any]:
    """The reference forward for transforms, which can't add into a gradient (the arguments at
    ``gradients``).
    """

    def plain(*arguments: Any) -> Any:
        if any(arguments[i] is not None for i in gradients):
            raise RuntimeError(
                "a given weight gradient is no part of torch.func's functions, nor of tensor "
                "subclasses: leave it out there"
            )
        return function(*arguments)

    return plain


registration.implement("linear_act_fwd", "linear_act", "linear_act_forward")
registration.implement("linear_act_bwd", "linear_act", "linear_act_backward")
registration.implement("linear_act_bwd_add", "linear_act", "linear_act_backward")
registration.register_fake("linear_act_fwd", _fake_forward)
registration.register_fake("linear_act_bwd", _fake_backward)
registration.register_fake("linear_act_bwd_add", _fake_backward_add)
registration.register_fake_of_cuda("linear_act_fwd", _fake_forward)
registration.register_fake_of_cuda("linear_act_bwd", _fake_backward)
registration.register_fake_of_cuda("linear_act_bwd_add", _fake_backward_add)
registration.register_autograd("linear_act_fwd", _backward, _setup_context)
register_reference_gradient("linear_act_bwd", reference.linear_act_backward_of_input)
_run = registration.route(
    "linear_act_fwd",
    4,
    reference_of(reference.linear_act_forward, 3),
    _setup_context,
    _backward,
    adapt=by_rows,
)
