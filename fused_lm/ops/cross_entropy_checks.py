"""Checks of the calls of ``cross_entropy`` and ``linear_cross_entropy``; what backends refuse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.checks import FLOATS, check_same_device, shapes_of, triton_refusal
from fused_lm.ops.linear_checks import CUDA_KERNELS as CUDA_PRODUCTS
from fused_lm.ops.registration import in_transform, needs_gradient
from fused_lm.reference.linear_cross_entropy import rows_at_once

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


class CrossEntropyCall(NamedTuple):
    """Checked arguments of one call of ``cross_entropy``."""

    logits: Tensor
    target: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    inplace_backward: bool


class LinearCrossEntropyCall(NamedTuple):
    """Checked arguments of one call of ``linear_cross_entropy``."""

    x: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    chunk_rows: int | None


def checked_call(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    inplace_backward: bool,
) -> CrossEntropyCall:
    """The call; raises as :func:`fused_lm.cross_entropy` says."""
    if logits.dim() == 0 or logits.shape[-1] == 0:
        shapes = shapes_of(logits=logits)
        raise ValueError(f"cross_entropy takes logits [..., V] with V >= 1, got {shapes}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"cross_entropy takes float logits, got {logits.dtype}")
    _check_target(target, "logits", logits, logits.shape[-1], ignore_index)
    _check_options(label_smoothing, z_loss, softcap, reduction)
    if inplace_backward:
        _check_in_place(logits)
    return CrossEntropyCall(
        logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction, inplace_backward
    )


def checked_linear_call(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    chunk_rows: int | None,
) -> LinearCrossEntropyCall:
    """The call; raises as :func:`fused_lm.linear_cross_entropy` says."""
    problem = None
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        problem = "linear_cross_entropy takes x [..., C] and weight [V, C]"
    elif weight.shape[0] == 0 or weight.shape[1] == 0:
        problem = "linear_cross_entropy takes V >= 1 and C >= 1"
    elif bias is not None and bias.shape != weight.shape[:1]:
        problem = "bias must be [V]"
    if problem is not None:
        raise ValueError(f"{problem}, got {shapes_of(x=x, weight=weight, bias=bias)}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"linear_cross_entropy takes float tensors, got {name} {t.dtype}")
        if t is not None and t.device != x.device:
            check_same_device({"x": x, name: t})
    _check_target(target, "x", x, weight.shape[0], ignore_index)
    _check_options(label_smoothing, z_loss, softcap, reduction)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction, chunk_rows)
    return LinearCrossEntropyCall(x, weight, target, bias, *options)


def _check_target(target: Tensor, name: str, of: Tensor, V: int, ignore_index: int) -> None:
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integers, got {target.dtype}")
    if target.shape != of.shape[:-1]:
        shapes = shapes_of(**{name: of, "target": target})
        raise ValueError(f"target must have the shape of {name} without its last dim, got {shapes}")
    if target.device != of.device:
        check_same_device({name: of, "target": target})
    # On a GPU this look at the values would wait for it.
    if target.is_cpu and type(target) is Tensor and not is_compiling() and not in_transform():
        outside = ((target < 0) | (target >= V)) & (target != ignore_index)
        if bool(outside.any()):
            wrong = target[outside][0].item()
            raise IndexError(
                f"target must be in [0, {V}) or ignore_index {ignore_index}, got {wrong}"
            )


def _check_options(label_smoothing: float, z_loss: float, softcap: float, reduction: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if not softcap >= 0.0:
        raise ValueError(f"softcap must not be negative (0 is none), got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _check_in_place(logits: Tensor) -> None:
    if is_compiling() or in_transform() or not needs_gradient((logits,)):
        return
    if logits.is_leaf:
        raise ValueError(
            "inplace_backward overwrites the logits, which must be an intermediate result, got a"
            " leaf that requires a gradient"
        )
    V = logits.shape[-1]
    try:
        rows = logits.detach().view(-1, V)
    except RuntimeError:
        apart = False
    else:
        apart = (V == 1 or rows.stride(1) == 1) and (rows.shape[0] <= 1 or rows.stride(0) >= V)
    if not apart:
        raise ValueError(
            "inplace_backward needs logits whose rows are contiguous and evenly apart, got"
            f" {shapes_of(logits=logits)} with strides {list(logits.stride())}"
        )


def _pytorch_refuses(call: CrossEntropyCall | LinearCrossEntropyCall) -> str | None:
    if call.softcap:
        return "PyTorch's cross entropy has no softcap"
    if call.z_loss:
        return "PyTorch's cross entropy has no z-loss"
    if isinstance(call, CrossEntropyCall):
        if call.inplace_backward:
            return "PyTorch's cross entropy keeps the logits: inplace_backward needs a kernel"
        return None
    if rows_of_one_chunk(call) < rows_of(call):
        # A number in the sentence would be a guard of torch.compile on this one number of rows.
        return "PyTorch's operators make the whole logits, which are more than one chunk here"
    return None


def rows_of(call: LinearCrossEntropyCall) -> int:
    """N of a call."""
    return call.x.numel() // call.x.shape[-1]


def rows_of_one_chunk(call: LinearCrossEntropyCall) -> int:
    """The most rows for which a call takes one chunk; by comparison with it guards stay few."""
    if call.chunk_rows is not None:
        return call.chunk_rows
    return rows_at_once(call.weight.shape[0], call.x.element_size())


def _cuda_refuses(call: CrossEntropyCall | LinearCrossEntropyCall) -> str | None:
    if call[0].dtype == torch.float64:
        return "the CUDA kernels compute in fp32; float64 runs through the reference"
    return extension.refusal(call[0])


def _triton_refuses(call: CrossEntropyCall | LinearCrossEntropyCall) -> str | None:
    if call[0].dtype == torch.float64:
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    return triton_refusal(call[0])


def _shape_class(call: CrossEntropyCall) -> tuple[str, int]:
    """Family: what is fused; size: vocabulary, by comparison with constants."""
    V = call.logits.shape[-1]
    return _family(call), sum(1 for limit in (2048, 16384, 65536) if limit < V)


def _linear_shape_class(call: LinearCrossEntropyCall) -> tuple[str, int]:
    """Family: what is fused, and whether there are chunks; size: width, on which the share of the
    products depends.
    """
    chunks = "chunks" if rows_of_one_chunk(call) < rows_of(call) else "whole"
    C = call.x.shape[-1]
    return f"{_family(call)}-{chunks}", sum(1 for limit in (1024, 4096) if limit < C)


def _family(call: CrossEntropyCall | LinearCrossEntropyCall) -> str:
    names = [n for n in ("label_smoothing", "z_loss", "softcap") if getattr(call, n)]
    return "-".join(names) or "plain"


def _never(call: CrossEntropyCall | LinearCrossEntropyCall) -> str | None:
    return None


_KERNELS = tuple(
    f"triton_kernels/{name}.py"
    for name in (
        "cross_entropy",
        "cross_entropy_kernels",
        "cross_entropy_scalars",
        "cross_entropy_tuning",
        "launch",
        "tanh",
    )
)
for _op in ("cross_entropy", "linear_cross_entropy"):
    dispatch.TABLE[_op] = (
        dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
        dispatch.Impl("triton", _triton_refuses, needs_record=True),
        dispatch.Impl("pytorch", _pytorch_refuses),
        dispatch.Impl("reference", _never),
    )
_CUDA_KERNELS = ("cross_entropy_rows", "cross_entropy_scalars")
records.KERNEL_SOURCES["cross_entropy", "cuda"] = _CUDA_KERNELS
records.KERNEL_SOURCES["linear_cross_entropy", "cuda"] = (*_CUDA_KERNELS, *CUDA_PRODUCTS)
records.SHAPE_CLASSES["cross_entropy"] = _shape_class
records.SHAPE_CLASSES["linear_cross_entropy"] = _linear_shape_class
records.KERNEL_SOURCES["cross_entropy", "triton"] = _KERNELS
records.KERNEL_SOURCES["linear_cross_entropy", "triton"] = (
    *_KERNELS,
    "triton_kernels/linear_cross_entropy.py",
    "reference/linear_cross_entropy.py",
)
