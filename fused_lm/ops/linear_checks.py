"""Checks of ``linear_act`` and ``ffn``, once, before any allocation; what each backend refuses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.checks import (
    FLOATS,
    autocast_enabled,
    check_same_device,
    shapes_of,
    tf32_allowed,
    triton_refusal,
)
from fused_lm.reference.activations import ACTIVATIONS, GATES

FEW_ROWS = 128
CUDA_STEP = 8
CUDA_SIZE = 2**31 - 1
"""Of widths, and the most rows or columns, of csrc/kernels/gemm.h."""


class LinearActCall(NamedTuple):
    """Checked arguments of one call of ``linear_act``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor | None
    activation: str
    transposed: bool


class FFNCall(NamedTuple):
    """Checked arguments of one call of ``ffn``."""

    x: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight_grad: Tensor | None
    down_weight_grad: Tensor | None
    activation: str
    transposed: bool
    recompute: bool


def checked_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
) -> LinearActCall:
    """The call; raises as the public function says."""
    _check_activation(activation, (*ACTIVATIONS, "none"))
    check_input(x)
    check_linear(x, x.shape[-1], weight, bias, weight_grad, transposed, "")
    if activation in GATES:
        _check_gated(weight, transposed, activation, "weight")
    return LinearActCall(x, weight, bias, weight_grad, activation, transposed)


def checked_ffn(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    recompute: bool,
    up_weight_grad: Tensor | None,
    down_weight_grad: Tensor | None,
) -> FFNCall:
    """The call; raises as the public function says."""
    _check_activation(activation, ACTIVATIONS)
    check_input(x)
    hidden = check_linear(x, x.shape[-1], up_weight, up_bias, up_weight_grad, transposed, "up_")
    if activation in GATES:
        _check_gated(up_weight, transposed, activation, "up_weight")
        hidden //= 2
    check_linear(x, hidden, down_weight, down_bias, down_weight_grad, transposed, "down_")
    return FFNCall(
        x, up_weight, up_bias, down_weight, down_bias, up_weight_grad, down_weight_grad,
        activation, transposed, recompute,
    )  # fmt: skip


def _check_activation(activation: str, known: tuple[str, ...]) -> None:
    if activation not in known:
        raise ValueError(f"activation must be one of {', '.join(known)}, got {activation!r}")


def check_input(x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"expected x [..., C], got {shapes_of(x=x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"expected a float tensor, got x {x.dtype}")


def check_linear(
    x: Tensor,
    wanted: int,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    transposed: bool,
    name: str,
) -> int:
    """Checks one linear of ``wanted`` inputs and returns its outputs."""
    layout = "[in, out]" if transposed else "[out, in]"
    if weight.dim() != 2 or weight.shape[0 if transposed else 1] != wanted:
        shapes = shapes_of(**{"x": x, f"{name}weight": weight})
        raise ValueError(f"{name}weight must be {layout} with in = {wanted}, got {shapes}")
    out = weight.shape[1 if transposed else 0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out):
        shapes = shapes_of(**{f"{name}weight": weight, f"{name}bias": bias})
        raise ValueError(f"{name}bias must be [out], got {shapes}")
    for what, t in ((f"{name}weight", weight), (f"{name}bias", bias)):
        if t is not None and t.dtype != x.dtype and not _autocasts(x, t):
            raise TypeError(f"x and {what} must have one dtype, got {x.dtype} and {t.dtype}")
        if t is not None and t.device != x.device:
            check_same_device({"x": x, what: t})
    if weight_grad is not None:
        _check_weight_grad(weight, weight_grad, f"{name}weight_grad")
    return out


def _autocasts(x: Tensor, t: Tensor) -> bool:
    """Autocast narrows what is mixed, but leaves fp64 as it is."""
    if not autocast_enabled(x.device):
        return False
    return t.dtype in FLOATS and torch.float64 not in (x.dtype, t.dtype)


def _check_weight_grad(weight: Tensor, weight_grad: Tensor, name: str) -> None:
    if weight_grad.shape != weight.shape:
        raise ValueError(
            f"{name} must have the shape of its weight, got {list(weight_grad.shape)} for "
            f"{list(weight.shape)}"
        )
    wide = weight_grad.dtype == torch.float64 != weight.dtype
    if weight_grad.dtype not in FLOATS or wide or weight_grad.requires_grad:
        raise TypeError(
            f"{name} must be fp32, fp16, bf16 or of its weight's dtype, and need no gradient itself"
        )
    if any(n > 1 and step == 0 for n, step in zip(weight.shape, weight_grad.stride(), strict=True)):
        raise ValueError(f"{name} must not be expanded: its elements share memory")
    check_same_device({"weight": weight, name: weight_grad})


def _check_gated(weight: Tensor, transposed: bool, activation: str, name: str) -> None:
    if weight.shape[1 if transposed else 0] % 2:
        raise ValueError(
            f"{activation} needs an even number of outputs, gates first and values after them, "
            f"got {shapes_of(**{name: weight})}"
        )


def _pytorch_refuses(call: Any) -> str | None:
    grads = call[6] if isinstance(call, FFNCall) else call.weight_grad
    if grads is not None:
        return "PyTorch's linear returns a new weight gradient, it can't add into a given one"
    return None


def cuda_limit(call: Any) -> str | None:
    """Why the CUDA kernels can't run a call on any GPU, None if they can on some."""
    dtype = call.x.dtype
    if dtype != torch.float64 and autocast_enabled(call.x.device):
        dtype = torch.get_autocast_dtype(call.x.device.type)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels of linear layers take float16 and bfloat16, got {dtype}"
    weights = (call[1], call[3]) if isinstance(call, FFNCall) else (call.weight,)
    gated = call.activation in GATES
    for weight in weights:
        if any(width % CUDA_STEP or not 0 < width <= CUDA_SIZE for width in weight.shape):
            return (
                f"the CUDA kernels of linear layers take widths that are multiples of {CUDA_STEP}, "
                f"got {shapes_of(weight=weight)}"
            )
    if gated and weights[0].shape[1 if call.transposed else 0] % (2 * CUDA_STEP):
        return (
            f"the CUDA kernels of linear layers take as many gates as a multiple of {CUDA_STEP}, "
            f"got {shapes_of(weight=weights[0])}"
        )
    if math.prod(call.x.shape[:-1]) > CUDA_SIZE:
        return "the CUDA kernels of linear layers take fewer than 2^31 rows"
    return None


def _cuda_refuses(call: Any) -> str | None:
    return cuda_limit(call) or extension.refusal(call.x)


def triton_refuses(call: Any) -> str | None:
    if call.x.dtype == torch.float64:
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    return triton_refusal(call.x)


def shape_class(call: Any) -> tuple[str, int]:
    """Family: the epilogue, the weights' layout, whether rows are too few to fill a tile (as when
    tokens are generated) and how fp32 is multiplied; size: width. All by comparison with constants.
    """
    kind = "gated" if call.activation in GATES else "plain"
    kinds = [kind if call.activation != "none" else "none"]
    if call.transposed:
        kinds.append("transposed")
    if getattr(call, "recompute", False):
        kinds.append("recompute")
    if math.prod(call.x.shape[:-1]) < FEW_ROWS:
        kinds.append("few")
    if tf32_allowed(call.x):
        kinds.append("tf32")
    C = call.x.shape[-1]
    return "-".join(kinds), sum(1 for limit in (1024, 2048, 4096) if limit < C)


def _never(call: Any) -> str | None:
    return None


TRITON_KERNELS = tuple(
    f"triton_kernels/{name}.py"
    for name in (
        "launch",
        "linear_act",
        "linear_act_fwd",
        "linear_act_bwd",
        "linear_act_tuning",
        "activations",
        "column_sums",
        "tanh",
    )
)
CUDA_KERNELS = ("gemm_sm80_bf16", "gemm_sm80_fp16", "gemm_sm90_bf16", "gemm_sm90_fp16")
for _op, _files in (
    ("linear_act", TRITON_KERNELS),
    ("ffn", (*TRITON_KERNELS, "triton_kernels/ffn.py")),
):
    dispatch.TABLE[_op] = (
        dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
        dispatch.Impl("triton", triton_refuses, needs_record=True),
        dispatch.Impl("pytorch", _pytorch_refuses),
        dispatch.Impl("reference", _never),
    )
    records.SHAPE_CLASSES[_op] = shape_class
    records.KERNEL_SOURCES[_op, "triton"] = _files
    records.KERNEL_SOURCES[_op, "cuda"] = CUDA_KERNELS
    records.TRAINING_SOURCES[_op, "cuda"] = ("activation_bwd",)
