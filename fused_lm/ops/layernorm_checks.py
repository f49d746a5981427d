"""Checks of a norm's call, once, before any allocation; what each backend refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.checks import (
    FLOATS,
    check_dropout,
    check_rng,
    check_same_device,
    shapes_of,
    triton_refusal,
)


class NormCall(NamedTuple):
    """Checked arguments of one call of ``layer_norm`` or ``rms_norm`` (bias None)."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    rng: Tensor | None
    eps: float
    dropout_p: float
    out_dtype: torch.dtype
    residual_dtype: torch.dtype


def checked_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> NormCall:
    """The call with its dtypes filled in; raises as the public functions say."""
    width, dtype, device = x.shape[-1:], x.dtype, x.device
    if not width or width[0] == 0:
        raise ValueError(f"a norm takes x [..., C] with C >= 1, got {shapes_of(x=x)}")
    if dtype not in FLOATS:
        raise TypeError(f"a norm takes float tensors, got x {dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, got {shapes_of(x=x, residual=residual)}"
        )
    # The commonest tensors in few steps, because eager users pay for each one.
    alike = residual is None or (residual.dtype is dtype and residual.device == device)
    for t in (weight, bias):
        if t is not None and not (t.dtype is dtype and t.shape == width and t.device == device):
            alike = False
    if not alike:
        _check_tensors(x, residual, weight, bias)
    if dropout_p:
        check_dropout(dropout_p)
    if rng is not None:
        check_rng(rng, x)
    if out_dtype is None:
        out_dtype = _default_out_dtype(x) if x.is_cuda else dtype
    elif out_dtype not in FLOATS:
        raise TypeError(f"a norm's outputs are float, got out_dtype {out_dtype}")
    if residual_dtype is None:
        residual_dtype = dtype
        if residual is not None and residual.dtype is not dtype:
            residual_dtype = torch.promote_types(dtype, residual.dtype)
    elif residual_dtype not in FLOATS:
        raise TypeError(f"a norm's outputs are float, got residual_dtype {residual_dtype}")
    return NormCall(x, residual, weight, bias, rng, eps, dropout_p, out_dtype, residual_dtype)


def _check_tensors(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"a norm takes float tensors, got {name} {t.dtype}")
        if t.device != x.device:
            check_same_device({"x": x, name: t})
        if name != "residual" and (t.dim() != 1 or t.shape[0] != x.shape[-1]):
            raise ValueError(f"{name} must be [C], got {shapes_of(**{'x': x, name: t})}")


def _default_out_dtype(x: Tensor) -> torch.dtype:
    """CUDA's autocast runs norms in fp32 and returns fp32; elsewhere the dtype of x is kept."""
    if x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def _pytorch_refuses(call: NormCall) -> str | None:
    if call.rng is not None and call.dropout_p > 0.0:
        return "PyTorch's dropout draws its own mask, not that of rng"
    stream = call.x.dtype
    parameters = (call.weight, call.bias)
    residual = call.residual
    plain = call.out_dtype is stream is call.residual_dtype
    plain = plain and (residual is None or residual.dtype is stream)
    if plain and all(p is None or p.dtype is stream for p in parameters):
        return None
    if call.residual is not None:
        stream = torch.promote_types(stream, call.residual.dtype)
    narrows = torch.promote_types(call.out_dtype, stream) == stream
    if not narrows and call.out_dtype != _default_out_dtype(call.x):
        return f"PyTorch's norm returns the dtype of its input, {stream}, not {call.out_dtype}"
    if call.residual_dtype != stream:
        return f"PyTorch's add returns {stream}, not {call.residual_dtype}"
    dtypes = {t.dtype for t in parameters if t is not None}
    on_cpu = call.x.device.type == "cpu"
    wide_parameters = on_cpu and stream.itemsize == 2 and dtypes == {torch.float32}
    if dtypes <= {stream} or wide_parameters or _default_out_dtype(call.x) != call.x.dtype:
        return None
    return f"PyTorch's norm can't mix a {stream} input with parameters of another dtype"


def _cuda_refuses(call: NormCall) -> str | None:
    tensors = (call.x, call.residual, call.weight, call.bias)
    dtypes = [t.dtype for t in tensors if t is not None]
    if torch.float64 in (*dtypes, call.out_dtype, call.residual_dtype):
        return "the CUDA kernels compute in fp32; float64 runs through the reference"
    return extension.refusal(call.x)


def _triton_refuses(call: NormCall) -> str | None:
    if torch.float64 in (call.x.dtype, call.out_dtype, call.residual_dtype):
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    return triton_refusal(call.x)


_SIZES = (256, 2048, 4608, 6144, 16384)
"""Widths at which one of the kernels gives way to another, in one of the dtypes
(csrc/kernels/layernorm_tuning.h, triton_kernels/layernorm_tuning.py).
"""
_VECTOR = 8


def _shape_class(call: NormCall) -> tuple[str, int]:
    """Family: what is fused, and what takes kernels of its own; size: width, by comparison with
    constants.
    """
    x, residual = call.x, call.residual
    kinds = []
    mixed = not (x.dtype is call.out_dtype is call.residual_dtype)
    if residual is not None:
        kinds.append("add")
        mixed = mixed or residual.dtype is not x.dtype
    if call.dropout_p > 0.0:
        kinds.append("dropout")
    if mixed:
        kinds.append("mixed")
    C = x.shape[-1]
    row = x.stride(-2) if x.dim() > 1 else C
    if C % _VECTOR or row % _VECTOR or x.storage_offset() % _VECTOR:
        kinds.append("unaligned")
    return "-".join(kinds) or "plain", sum(1 for limit in _SIZES if limit < C)


def _never(call: NormCall) -> str | None:
    return None


_KERNELS = tuple(
    f"triton_kernels/{name}.py"
    for name in (
        "launch",
        "layernorm",
        "layernorm_fwd",
        "layernorm_bwd",
        "layernorm_tuning",
        "column_sums",
        "philox",
    )
)
for _op in ("layer_norm", "rms_norm"):
    dispatch.TABLE[_op] = (
        dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
        dispatch.Impl("triton", _triton_refuses, needs_record=True),
        dispatch.Impl("pytorch", _pytorch_refuses),
        dispatch.Impl("reference", _never),
    )
    records.SHAPE_CLASSES[_op] = _shape_class
    records.KERNEL_SOURCES[_op, "cuda"] = ("layernorm_fwd", "layernorm_bwd")
    records.KERNEL_SOURCES[_op, "triton"] = _KERNELS
