"""``ffn``: the public function and the way of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.linear_act import by_rows, cast_for_autocast, reference_of, rows_of
from fused_lm.ops.linear_checks import FFNCall, checked_ffn
from fused_lm.ops.norm_input import NormInput, checked_norm_input, keep, restore
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import linear_act as pytorch_linear
from fused_lm.reference import ffn as reference
from fused_lm.reference.linear_act import hidden_width, keeps_pre


def ffn(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    transposed: bool = False,
    recompute: bool = False,
    up_weight_grad: Tensor | None = None,
    down_weight_grad: Tensor | None = None,
    x_norm: NormInput | None = None,
) -> Tensor:
    """The feed-forward network of a transformer block: ``act(x W1^T + b1) W2^T + b2``.

    Args:
        x: [..., C] bf16 | fp16 | fp32 | fp64, any strides.
        up_weight: W1 [F, C], for a gated activation [2F, C], gates first; dtype of x (under
            autocast mixed, as torch's linear takes it).
        down_weight: W2 [C2, F].
        up_bias, down_bias: [F] (gated: [2F]) and [C2], or None.
        activation: gelu | gelu_tanh | relu | relu_squared | silu, or gated swiglu | geglu |
            geglu_tanh: ``act(gate) * value``.
        transposed: Weights are [C, F] and [F, C2], as GPT-2's Conv1D keeps them.
        recompute: Drop the activation and make it again from the pre-activation in the epilogue of
            a backward product: F elements a row less, one store more, the same numbers. On
            cuda PyTorch makes it again in a pass of its own, and W2's gradient may differ in its
            last bits. PyTorch's backend keeps what PyTorch keeps.
        up_weight_grad, down_weight_grad, x_norm: As ``weight_grad`` and ``x_norm`` of
            :func:`fused_lm.linear_act`.
    Returns:
        [..., C2], dtype of x (autocast's, under autocast).
    Accuracy: |err| <= 2 x the error of the same-dtype torch reference. Sums are fp32, but for y and
        dx, which are torch's own products.
    Memory: saves x (with ``x_norm`` nothing new), the pre-activation and, without ``recompute``,
        the activation; relu saves the activation alone.
    Backends: cuda (16-bit, widths that are multiples of 8), triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202).
    """
    call = checked_ffn(
        x, up_weight, down_weight, up_bias, down_bias, activation, transposed, recompute,
        up_weight_grad, down_weight_grad,
    )  # fmt: skip
    x_norm = checked_norm_input(x_norm, x)
    backend = dispatch.choose("ffn", call)
    if backend == "pytorch":
        return pytorch_linear.ffn(
            x, up_weight, up_bias, down_weight, down_bias, activation, transposed
        )
    return _run(_arguments(call), backend, x_norm)[0]


def _arguments(call: FFNCall) -> tuple[Any, ...]:
    tensors = cast_for_autocast(*call[:5])
    saves = registration.needs_gradient(tensors)
    keep_pre = saves and keeps_pre(call.activation)
    keep_hidden = saves and not (call.recompute and keep_pre)
    return (*tensors, *call[5:9], keep_pre, keep_hidden)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    x, *parameters, up_grad, down_grad, activation, transposed, _, _, backend = inputs
    ctx.weight_grads = (up_grad, down_grad)  # written, not read: see linear_act
    ctx.save_for_backward(*parameters, *output[1:], *keep(ctx, x))
    ctx.options = (activation, transposed, backend)
    return output[:1]


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the 12 inputs: x, both weights and both biases have one."""
    *parameters, pre, hidden, x, weight, bias = ctx.saved_tensors
    if dy is None:
        return (None,) * 12
    activation, transposed, backend = ctx.options
    x = restore(ctx.kept, x, weight, bias, backend)
    needs = [any(ctx.needs_input_grad[i : i + 1]) for i in range(5)]
    needs_dx, needs_up, needs_up_bias, needs_down, needs_down_bias = needs
    rows = (rows_of(dy), rows_of(x))
    arguments = (*rows, *parameters, pre, hidden, activation, transposed, needs_dx)
    arguments = (*arguments, needs_up_bias or needs_down_bias)
    needed = zip((needs_up, needs_down), ctx.weight_grads, strict=True)
    up_grad, down_grad = (grad if needs else None for needs, grad in needed)
    needs_up, needs_down = needs_up and up_grad is None, needs_down and down_grad is None
    arguments = (*arguments, needs_up, needs_down)
    if up_grad is None and down_grad is None:
        found = registration.run_backward("ffn_bwd", *arguments, backend)
    else:
        found = registration.run_backward(
            "ffn_bwd_add", *arguments, up_grad, down_grad, backend, differentiable=False
        )
    dx, dup, dup_bias, ddown, ddown_bias = found
    return (
        dx.view(x.shape) if needs_dx else None,
        dup if needs_up else None,
        dup_bias if needs_up_bias else None,
        ddown if needs_down else None,
        ddown_bias if needs_down_bias else None,
        *(None,) * 7,
    )


def _fake_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, activation, transposed, keep_pre, keep_hidden, _ = rest
    N, width = x.shape[0], up_weight.shape[1 if transposed else 0]
    F = hidden_width(width, activation)
    return (
        x.new_empty(N, down_weight.shape[1 if transposed else 0]),
        x.new_empty((N, width) if keep_pre else (0,)),
        x.new_empty((N, F) if keep_hidden else (0,)),
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs_dx, needs_dbiases, needs_dup, needs_ddown, _ = rest[-5:]

    def gradient(t: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(t) if needed and t is not None else x.new_empty(0)

    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        gradient(up_weight, needs_dup),
        gradient(up_bias, needs_dbiases),
        gradient(down_weight, needs_ddown),
        gradient(down_bias, needs_dbiases),
    )


def _fake_dpre(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    transposed: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[1] if needs_dbias else 0)


def _fake_backward_add(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, backend = arguments
    return _fake_backward(*(*tensors, backend))


registration.implement("ffn_fwd", "ffn", "ffn_forward")
registration.implement("ffn_bwd", "ffn", "ffn_backward")
registration.implement("ffn_bwd_add", "ffn", "ffn_backward")
registration.register_fake("ffn_fwd", _fake_forward)
registration.register_fake("ffn_bwd", _fake_backward)
registration.register_fake("ffn_bwd_add", _fake_backward_add)
registration.register_fake_of_cuda("ffn_dpre", _fake_dpre)
registration.register_autograd("ffn_fwd", _backward, _setup_context)
register_reference_gradient("ffn_bwd", reference.ffn_backward_of_input)
_run = registration.route(
    "ffn_fwd",
    7,
    reference_of(reference.ffn_forward, 5, 6),
    _setup_context,
    _backward,
    adapt=by_rows,
)
