"""Inputs of a linear layer that are not kept for its backward: a norm's output is made again.

A norm keeps its input, the residual stream, and the linear layer behind it keeps the norm's output:
as many bytes once more, for the weight gradient alone. Told where its input came from, a layer
keeps the stream, which is there anyway, and runs the norm a second time in the backward: one pass
of 4 bytes an element beside products of 2 * F FLOPs an element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lm.ops import registration
from fused_lm.ops.checks import check_same_device, shapes_of
from fused_lm.ops.layernorm import layer_norm, rms_norm


class NormInput(NamedTuple):
    """What x was made of: ``layer_norm(stream, weight, bias)``, or ``rms_norm`` without a bias.

    Attributes:
        output: x itself. A layer that is handed another tensor (a hook's, a cast one) keeps that.
        stream: [..., C], what the norm normalised: its second output where it added a residual,
            else its input.
        weight, bias: [C] or None.
        eps: As the norm used it.
        rms: It was ``rms_norm``.

    Second derivatives are those by the stream and the norm's parameters: x is no variable any more.
    """

    output: Tensor
    stream: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


def checked_norm_input(x_norm: NormInput | None, x: Tensor) -> NormInput | None:
    """``x_norm`` if x is its output, else None.

    Raises:
        ValueError: A shape doesn't fit. TypeError: a tensor is on another device.
    """
    if x_norm is None or x_norm.output is not x:
        return None
    parts = {"stream": x_norm.stream, "weight": x_norm.weight, "bias": x_norm.bias}
    tensors = {f"x_norm.{name}": t for name, t in parts.items() if t is not None}
    fits = all(t.shape in (x.shape, x.shape[-1:]) for t in tensors.values())
    if x_norm.stream.shape != x.shape or not fits:
        raise ValueError(
            f"x_norm needs stream as x and parameters [C], got {shapes_of(x=x, **tensors)}"
        )
    check_same_device({"x": x, **tensors})
    return x_norm


class Kept(NamedTuple):
    """How the input of a layer was kept; beside it, two tensors more are saved."""

    dtype: torch.dtype
    norm: tuple[float, bool] | None


def keep(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Three tensors to save instead of x; ``ctx.kept`` says what they are."""
    x_norm: NormInput | None = getattr(ctx, "extra", None)
    if x_norm is None:
        ctx.kept = Kept(x.dtype, None)
        return x, None, None
    ctx.kept = Kept(x.dtype, (x_norm.eps, x_norm.rms))
    return x_norm.stream, x_norm.weight, x_norm.bias


def restore(
    kept: Kept, saved: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    """x again: by the layer's own backend, or with ``create_graph`` as a function of the stream."""
    if kept.norm is None:
        return saved
    eps, rms = kept.norm
    if torch.is_grad_enabled():
        if rms:
            y: Any = rms_norm(saved, weight, eps=eps, out_dtype=kept.dtype)
        else:
            y = layer_norm(saved, weight, bias, eps=eps, out_dtype=kept.dtype)
        return y
    rows = saved.reshape(-1, saved.shape[-1])
    parameters = (weight,) if rms else (weight, bias)
    arguments = (rows, None, *parameters, None, eps, 0.0, kept.dtype, saved.dtype)
    op = "rms_norm_fwd" if rms else "layer_norm_fwd"
    backend = "reference" if saved.dtype == torch.float64 else backend
    y, *_ = registration.execute(op, *arguments, backend)
    return y.view(saved.shape)
