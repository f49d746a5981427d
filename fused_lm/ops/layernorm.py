"""``layer_norm`` and ``rms_norm``: the public functions and the way of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.layernorm_checks import NormCall, checked_call
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import layernorm as pytorch_layernorm
from fused_lm.reference import layernorm as reference


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_residual: bool = False,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dim, fused with dropout and the residual add before it.

    ``stream = residual + dropout(x); y = (stream - mean) / sqrt(var + eps) * weight + bias``

    Args:
        x: [..., C] bf16 | fp16 | fp32 | fp64, C >= 1.
        weight, bias: [C], any float dtype, or None.
        eps: Added to the variance.
        residual: Shape of x, any float dtype, or None.
        dropout_p: Probability to drop an element of x, in [0, 1].
        rng: int64 [4] from :func:`fused_lm.make_rng` to fix the dropout mask; drawn if a kernel
            needs it.
        return_residual: Also return the stream; without residual and dropout that is x itself.
        out_dtype: Of y. Default: dtype of x.
        residual_dtype: Of the stream. Default: what torch's ``residual + x`` returns, without a
            residual x's.
    Returns:
        y [..., C], or (y, stream).
    Accuracy: statistics in fp32 of the stream as stored; |err| <= 2 x the error of the same-dtype
        torch reference.
    Memory: 8 bytes a row beyond the outputs.
    Backends: cuda (Ampere and later), triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Ba, Kiros, Hinton 2016 (arXiv:1607.06450).
    """
    call = checked_call(x, residual, weight, bias, rng, eps, dropout_p, out_dtype, residual_dtype)
    backend = dispatch.choose("layer_norm", call)
    if backend != "pytorch":
        return _run(call, backend, return_residual, rms=False)
    y, stream = pytorch_layernorm.layer_norm(x, weight, bias, eps, residual, dropout_p)
    y = y if y.dtype == call.out_dtype else y.to(call.out_dtype)
    return (y, stream) if return_residual else y


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_residual: bool = False,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dim: ``stream / sqrt(mean(stream^2) + eps) * weight``.

    Arguments, result and errors as :func:`layer_norm`; ``eps`` defaults to that of the dtype that
    statistics have, :func:`default_eps`, as in torch.
    Source: Zhang, Sennrich 2019 (arXiv:1910.07467).
    """
    if eps is None:
        eps = default_eps(x.dtype) if x.dtype.is_floating_point else 0.0
    call = checked_call(x, residual, weight, None, rng, eps, dropout_p, out_dtype, residual_dtype)
    backend = dispatch.choose("rms_norm", call)
    if backend != "pytorch":
        return _run(call, backend, return_residual, rms=True)
    y, stream = pytorch_layernorm.rms_norm(x, weight, call.eps, residual, dropout_p)
    y = y if y.dtype == call.out_dtype else y.to(call.out_dtype)
    return (y, stream) if return_residual else y


def default_eps(dtype: torch.dtype) -> float:
    """What torch's RMSNorm takes for ``eps=None``: 2^-23, for fp64 2^-52. The name in its
    documentation, ``finfo(dtype).eps``, is that of the sums, which are fp32 for 16-bit inputs.
    """
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _run(
    call: NormCall, backend: str, return_residual: bool, rms: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The way of a call that no operator of PyTorch's takes."""
    if call.dropout_p == 0.0:
        call = call if call.rng is None else call._replace(rng=None)
    elif call.rng is None:
        call = call._replace(rng=registration.make_rng(call.x.device))
    # An RMSNorm has no bias.
    outputs = _RUN[rms](call[:3] + call[4:] if rms else call, backend)
    if not return_residual:
        return outputs[0]
    has_stream = call.residual is not None or call.rng is not None
    return outputs[0], outputs[1] if has_stream else call.x.to(call.residual_dtype)


def _by_rows(
    forward: Callable[..., Any], x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Runs a forward on rows [N, C] and gives y and the stream the shape of x again."""
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    y, stream, *statistics = forward(rows, added, *rest)
    # Views that an autograd.Function returns can't be changed in place; these are none.
    y = torch.ops.aten._unsafe_view(y, shape)
    if stream.dim() == 2:
        stream = torch.ops.aten._unsafe_view(stream, shape)
    return y, stream, *statistics


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Saves the stream, which is x itself where the operator returned an empty one; returns y, and
    the stream if there is one.
    """
    x, residual = inputs[:2]
    parameters_and_rng, (_, dropout_p, _, _, backend) = inputs[2:-5], inputs[-5:]
    residual_dtype = None if residual is None else residual.dtype
    has_stream = residual is not None or parameters_and_rng[-1] is not None
    ctx.options = (has_stream, dropout_p, x.dtype, residual_dtype, backend)
    stream = output[1] if has_stream else x
    ctx.save_for_backward(stream, *output[2:], *parameters_and_rng)
    return output[:2] if has_stream else output[:1]


def _backward_layer_norm(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the 10 inputs: x, residual, weight and bias have one."""
    stream, mean, rstd, weight, bias, rng = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _call_backward(
        ctx,
        "layer_norm_bwd",
        gradients,
        stream,
        (weight, bias, mean, rstd, rng),
    )
    return (
        dx,
        dresidual,
        None if weight is None else dweight,
        None if bias is None else dbias,
        *(None,) * 6,
    )


def _backward_rms_norm(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the 9 inputs: x, residual and weight have one."""
    stream, rstd, weight, rng = ctx.saved_tensors
    dx, dresidual, dweight = _call_backward(
        ctx,
        "rms_norm_bwd",
        gradients,
        stream,
        (weight, rstd, rng),
    )
    return dx, dresidual, None if weight is None else dweight, *(None,) * 6


def _call_backward(
    ctx: Any,
    op: str,
    gradients: tuple[Tensor | None, ...],
    stream: Tensor,
    saved: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Runs a backward on rows [N, C]; dx and dresidual get the shape of the stream."""
    has_stream, *options = ctx.options
    shape = stream.shape
    rows = stream.reshape(-1, shape[-1])
    dy, dstream = gradients[0], gradients[1] if has_stream else None
    dy = torch.zeros_like(rows) if dy is None else dy.reshape(rows.shape)
    dstream = None if dstream is None else dstream.reshape(rows.shape)
    arguments = (dy, dstream, rows, *saved, *options)
    dx, dresidual, *parameters = registration.run_backward(op, *arguments)
    dx = dx.view(shape)
    residual_dtype = options[2]
    if residual_dtype is None:
        return dx, None, *parameters
    return dx, dx if dresidual.dim() == 1 else dresidual.view(shape), *parameters


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, *rest: Any, statistics: int
) -> tuple[Tensor, ...]:
    *_, rng, _, _, out_dtype, residual_dtype, _ = rest
    N = x.shape[0]
    empty = residual is None and rng is None
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty((0,) if empty else x.shape, dtype=residual_dtype),
        *(x.new_empty(N, dtype=accumulator) for _ in range(statistics)),
    )


def _fake_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, *rest: Any) -> Any:
    return _fake_forward(x, residual, weight, *rest, statistics=2)


def _fake_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, *rest: Any) -> Any:
    return _fake_forward(x, residual, weight, *rest, statistics=1)


def _fake_backward(
    dy: Tensor, parameters: tuple[Tensor | None, ...], rest: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    rng, _, x_dtype, residual_dtype, _ = rest
    same = residual_dtype is None or (rng is None and residual_dtype == x_dtype)
    return (
        dy.new_empty(dy.shape, dtype=x_dtype),
        dy.new_empty((0,) if same else dy.shape, dtype=residual_dtype or x_dtype),
        *(dy.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters),
    )


def _fake_layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *rest: Any,
) -> Any:
    return _fake_backward(dy, (weight, bias), rest)


def _fake_rms_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *rest: Any,
) -> Any:
    return _fake_backward(dy, (weight,), rest)


_RUN: dict[bool, Callable[[tuple[Any, ...], str], Any]] = {}
for _op, _tensors, _backward_formula, _fake, _fake_bwd, _reference in (
    (
        "layer_norm",
        5,
        _backward_layer_norm,
        _fake_layer_norm,
        _fake_layer_norm_backward,
        reference.layer_norm_backward_of_stream,
    ),
    (
        "rms_norm",
        4,
        _backward_rms_norm,
        _fake_rms_norm,
        _fake_rms_norm_backward,
        reference.rms_norm_backward_of_stream,
    ),
):
    registration.implement(f"{_op}_fwd", "layernorm", f"{_op}_forward")
    registration.implement(f"{_op}_bwd", "layernorm", f"{_op}_backward")
    registration.register_fake(f"{_op}_fwd", _fake)
    registration.register_fake(f"{_op}_bwd", _fake_bwd)
    registration.register_fake_of_cuda(f"{_op}_fwd", _fake)
    registration.register_fake_of_cuda(f"{_op}_bwd", _fake_bwd)
    registration.register_autograd(f"{_op}_fwd", _backward_formula, _setup_context)
    register_reference_gradient(f"{_op}_bwd", _reference)
    _RUN[_op == "rms_norm"] = registration.route(
        f"{_op}_fwd",
        _tensors,
        getattr(reference, f"{_op}_forward"),
        _setup_context,
        _backward_formula,
        adapt=_by_rows,
    )
