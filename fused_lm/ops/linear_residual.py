"""``linear_residual``: the public function and the way of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.linear_act import cast_for_autocast, rows_of
from fused_lm.ops.linear_residual_checks import LinearResidualCall, checked_linear_residual
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import linear_residual as pytorch_linear
from fused_lm.reference import linear_residual as reference


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """A linear layer, dropout and the add to a residual stream, on cuda in one kernel: ``residual +
    dropout(x W^T + b)``, the end of attention and of a feed-forward network.

    Args:
        x: [..., C] bf16 | fp16 | fp32 | fp64, any strides.
        weight: [F, C], dtype of x (under autocast mixed, as torch's linear takes it).
        bias: [F] or None.
        residual: [..., F], dtype of x or fp32; read, not changed. Autocast leaves fp32 as it is.
        dropout_p: Probability to drop an element of the linear layer, in [0, 1].
        rng: int64 [4] from :func:`fused_lm.make_rng` to fix the dropout mask; drawn if a kernel
            needs it.
        transposed: The weight is [C, F], as GPT-2's Conv1D keeps it; nothing is transposed.
    Returns:
        [..., F], dtype of the residual (under autocast fp32 or autocast's).
    Accuracy: |err| <= 2 x the error of the same-dtype torch reference; on cuda sum, bias, dropout
        and add are fp32 and rounded once.
    Memory: saves x alone, and 32 bytes for the mask.
    Backends: cuda (16-bit, widths that are multiples of 8), triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), 5.4.
    """
    call = checked_linear_residual(x, weight, bias, residual, rng, dropout_p, transposed)
    backend = dispatch.choose("linear_residual", call)
    if backend == "pytorch":
        stream = stream_of(x, residual)
        return pytorch_linear.linear_residual(x, weight, bias, stream, dropout_p, transposed)
    found = _run(_arguments(call), backend)
    return found if isinstance(found, Tensor) else found[0]


def stream_of(x: Tensor, residual: Tensor) -> Tensor:
    """As it is added to: wide, or in the dtype of the product, which autocast may have chosen."""
    dtype = registration.autocast_dtype(x.device)
    narrow = residual.dtype not in (torch.float32, torch.float64)
    return residual.to(dtype) if dtype is not None and narrow else residual


def _arguments(call: LinearResidualCall) -> tuple[Any, ...]:
    x, weight, bias = cast_for_autocast(*call[:3])
    residual, rng = stream_of(x, call.residual), call.rng
    if call.dropout_p == 0.0:
        rng = None
    elif rng is None:
        rng = registration.make_rng(x.device)
    return x, weight, bias, residual, rng, *call[5:]


def _by_rows(forward: Callable[..., Any], x: Tensor, *rest: Any) -> Tensor:
    """Runs a forward on rows [N, C] and gives y the shape of the residual again."""
    weight, bias, residual, *options = rest
    y = forward(rows_of(x), weight, bias, rows_of(residual), *options)
    # A view that an autograd.Function returns can't be changed in place; this is none.
    return torch.ops.aten._unsafe_view(y, residual.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
    x, weight, bias, _, rng, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, rng)
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the 8 inputs: x, weight, bias and residual have one."""
    x, weight, bias, rng = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    dropout_p, transposed, backend = ctx.options
    needs = [any(ctx.needs_input_grad[i : i + 1]) for i in range(4)]
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
    dx = dweight = dbias = None
    if needs_dx or needs_dweight or needs_dbias:
        dx, dweight, dbias = registration.run_backward(
            "linear_residual_bwd", rows_of(dy), rows_of(x), weight, bias, rng, dropout_p,
            transposed, needs_dx, needs_dbias, needs_dweight, backend,
        )  # fmt: skip
    return (
        dx.view(x.shape) if dx is not None and needs_dx else None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
        dy if needs_dresidual else None,
        *(None,) * 4,
    )


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *rest: Any
) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        torch.empty_like(weight) if needs_dweight else weight.new_empty(0),
        bias.new_empty(bias.shape) if needs_dbias and bias is not None else x.new_empty(0),
    )


registration.implement("linear_residual_fwd", "linear_residual", "linear_residual_forward")
registration.implement("linear_residual_bwd", "linear_residual", "linear_residual_backward")
registration.register_fake("linear_residual_fwd", _fake_forward)
registration.register_fake("linear_residual_bwd", _fake_backward)
registration.register_fake_of_cuda("linear_residual_fwd", _fake_forward)
registration.register_fake_of_cuda("linear_residual_bwd", _fake_backward)
registration.register_autograd("linear_residual_fwd", _backward, _setup_context)
register_reference_gradient("linear_residual_bwd", reference.linear_residual_backward)
_run = registration.route(
    "linear_residual_fwd",
    5,
    reference.linear_residual_forward,
    _setup_context,
    _backward,
    adapt=_by_rows,
)
