"""Checks of ``linear_residual``, once, before any allocation; what each backend refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops import linear_checks
from fused_lm.ops.checks import (
    FLOATS,
    autocast_enabled,
    check_dropout,
    check_rng,
    check_same_device,
    shapes_of,
)
from fused_lm.ops.linear_checks import (
    CUDA_KERNELS,
    TRITON_KERNELS,
    LinearActCall,
    check_input,
    check_linear,
    shape_class,
    triton_refuses,
)
from fused_lm.ops.registration import autocast_dtype


class LinearResidualCall(NamedTuple):
    """Checked arguments of one call of ``linear_residual``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    rng: Tensor | None
    dropout_p: float
    transposed: bool

    @property
    def layer(self) -> LinearActCall:
        """Without what it is added to."""
        return LinearActCall(self.x, self.weight, self.bias, None, "none", self.transposed)


def checked_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    transposed: bool,
) -> LinearResidualCall:
    """The call; raises as the public function says."""
    check_input(x)
    out = check_linear(x, x.shape[-1], weight, bias, None, transposed, "")
    if residual.shape != (*x.shape[:-1], out):
        shapes = shapes_of(x=x, weight=weight, residual=residual)
        raise ValueError(f"residual must be [..., F] with F = {out}, got {shapes}")
    if residual.dtype not in _stream_dtypes(x):
        wanted = " or ".join(str(dtype) for dtype in _stream_dtypes(x))
        raise TypeError(f"residual must be {wanted} for an x of {x.dtype}, got {residual.dtype}")
    check_same_device({"x": x, "residual": residual})
    check_dropout(dropout_p)
    if rng is not None:
        check_rng(rng, x)
    return LinearResidualCall(x, weight, bias, residual, rng, dropout_p, transposed)


def _stream_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Of x, or fp32. Autocast narrows x, and leaves a stream wide."""
    if x.dtype == torch.float64:
        return (x.dtype,)
    return FLOATS[:3] if autocast_enabled(x.device) else (x.dtype, torch.float32)


def cuda_limit(call: LinearResidualCall) -> str | None:
    """Why the CUDA kernels can't run a call on any GPU, None if they can on some."""
    return linear_checks.cuda_limit(call.layer)


def _cuda_refuses(call: LinearResidualCall) -> str | None:
    return cuda_limit(call) or extension.refusal(call.x)


def _pytorch_refuses(call: LinearResidualCall) -> str | None:
    if call.rng is not None and call.dropout_p > 0.0:
        return "PyTorch's dropout draws its own mask, not that of rng"
    return None


def _shape_class(call: LinearResidualCall) -> tuple[str, int]:
    """As a linear layer's, dropout and a wide stream apart."""
    family, size = shape_class(call.layer)
    kinds = [family]
    if call.dropout_p > 0.0:
        kinds.append("dropout")
    dtype = autocast_dtype(call.x.device) or call.x.dtype
    if call.residual.dtype == torch.float32 != dtype:
        kinds.append("wide")
    return "-".join(kinds), size


def _triton_refuses(call: LinearResidualCall) -> str | None:
    return triton_refuses(call.layer)


def _never(call: LinearResidualCall) -> str | None:
    return None


dispatch.TABLE["linear_residual"] = (
    dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("pytorch", _pytorch_refuses),
    dispatch.Impl("reference", _never),
)
records.SHAPE_CLASSES["linear_residual"] = _shape_class
records.KERNEL_SOURCES["linear_residual", "triton"] = (
    *TRITON_KERNELS,
    "triton_kernels/linear_residual.py",
    "triton_kernels/layernorm_fwd.py",
    "triton_kernels/philox.py",
)
records.KERNEL_SOURCES["linear_residual", "cuda"] = CUDA_KERNELS
records.TRAINING_SOURCES["linear_residual", "cuda"] = ("activation_bwd",)
