"""LayerNorm and RMSNorm with fused dropout and residual add, the derivation in plain PyTorch.

    stream = residual + dropout(x)               rounded to the stream's dtype before it is
    normalised xhat   = (stream - mean) * rstd              RMSNorm: mean = 0, rstd = 1 /
    sqrt(mean(stream^2) + eps) y      = xhat * weight + bias

Backward, with g = weight * dy and means over the row:

    dstream' = dstream + rstd * (g - mean(g) - xhat * mean(g * xhat))    (RMSNorm: without mean(g))
    dresidual = dstream';  dx = keep * dstream';  dweight = sum(dy * xhat);  dbias = sum(dy)

Statistics are fp32 (fp64 for fp64), from centred values: E[x^2] - E[x]^2 cancels at large means.
Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_lm.reference.philox import scaled_keep


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), mean [N], rstd [N]."""
    stream = _stream(x, residual, rng, dropout_p, residual_dtype)
    wide = _widened(x if stream.dim() == 1 else stream)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = _affine(centred * rstd, weight, bias)
    return y.to(out_dtype), stream, mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dresidual, dweight, dbias); dresidual is empty where it would equal dx."""
    xhat = (_widened(stream) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dy = dy.to(xhat.dtype)
    g = dy if weight is None else dy * weight.to(xhat.dtype)
    shifted = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
    dx, dresidual = _split(shifted, dstream, rstd, rng, dropout_p, x_dtype, residual_dtype)
    dweight = dy.new_empty(0) if weight is None else (dy * xhat).sum(0).to(weight.dtype)
    dbias = dy.new_empty(0) if bias is None else dy.sum(0).to(bias.dtype)
    return dx, dresidual, dweight, dbias


def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    rng: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), rstd [N]."""
    stream = _stream(x, residual, rng, dropout_p, residual_dtype)
    wide = _widened(x if stream.dim() == 1 else stream)
    rstd = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return _affine(wide * rstd, weight, None).to(out_dtype), stream, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dresidual, dweight); dresidual is empty where it would equal dx."""
    xhat = _widened(stream) * rstd.unsqueeze(-1)
    dy = dy.to(xhat.dtype)
    g = dy if weight is None else dy * weight.to(xhat.dtype)
    shifted = g - xhat * (g * xhat).mean(-1, keepdim=True)
    dx, dresidual = _split(shifted, dstream, rstd, rng, dropout_p, x_dtype, residual_dtype)
    dweight = dy.new_empty(0) if weight is None else (dy * xhat).sum(0).to(weight.dtype)
    return dx, dresidual, dweight


def layer_norm_backward_of_stream(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`layer_norm_backward` as a function of the stream alone, which second derivatives need.

    The statistics are functions of the stream. ``eps`` is what they leave over: rstd**-2 - var.
    """
    wide = _widened(stream)
    own_mean = wide.mean(-1)
    centred = wide - own_mean.unsqueeze(-1)
    own_rstd = _rstd_of((centred * centred).mean(-1), rstd)
    return layer_norm_backward(dy, dstream, stream, weight, bias, own_mean, own_rstd, *rest)


def rms_norm_backward_of_stream(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`layer_norm_backward_of_stream`."""
    wide = _widened(stream)
    own_rstd = _rstd_of((wide * wide).mean(-1), rstd)
    return rms_norm_backward(dy, dstream, stream, weight, own_rstd, *rest)


def _rstd_of(variance: Tensor, rstd: Tensor) -> Tensor:
    eps = (rstd.double().pow(-2) - variance.double()).detach()
    return (variance.double() + eps).rsqrt().to(rstd.dtype)


def _widened(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * weight.to(xhat.dtype)
    return y if bias is None else y + bias.to(xhat.dtype)


def _keep(rng: Tensor, N: int, C: int, dropout_p: float, dtype: torch.dtype) -> Tensor:
    return scaled_keep(rng, 1, 1, N, C, dropout_p, dtype)[0, 0]


def _stream(
    x: Tensor,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    residual_dtype: torch.dtype,
) -> Tensor:
    if residual is None and rng is None:
        return x.new_empty(0, dtype=residual_dtype)
    stream = _widened(x)
    if rng is not None:
        stream = stream * _keep(rng, x.shape[0], x.shape[1], dropout_p, stream.dtype)
    if residual is not None:
        stream = _widened(residual) + stream
    return stream.to(residual_dtype)


def _split(
    shifted: Tensor,
    dstream: Tensor | None,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The stream's gradient, to x through the dropout mask and to the residual as it is."""
    total = rstd.unsqueeze(-1) * shifted
    if dstream is not None:
        total = total + dstream.to(total.dtype)
    dx = total
    if rng is not None:
        dx = total * _keep(rng, total.shape[0], total.shape[1], dropout_p, total.dtype)
    if residual_dtype is None or (rng is None and residual_dtype == x_dtype):
        return dx.to(x_dtype), total.new_empty(0)
    return dx.to(x_dtype), total.to(residual_dtype)
