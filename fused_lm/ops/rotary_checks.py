"""Checks of a rotary call, once, before any allocation; what each backend refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lm import dispatch, records
from fused_lm.ops.checks import FLOATS, check_same_device, shapes_of, triton_refusal
from fused_lm.ops.registration import in_transform

MAX_HEAD_DIM = 4096
"""A program of the Triton kernel holds at least one whole row."""


class RotaryCall(NamedTuple):
    """Checked arguments of one call, in the order of ``torch.ops.fused_lm.rotary_fwd``."""

    x: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    interleaved: bool


def checked_call(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    k: Tensor | None = None,
) -> RotaryCall:
    """The call; raises as the public functions say."""
    if x.dim() != 4 or x.dtype not in FLOATS:
        _raise_about("x", x)
    if k is not None and (
        k.dim() != 4
        or k.dtype != x.dtype
        or k.shape[0] != x.shape[0]
        or k.shape[2:] != x.shape[2:]
        or k.device != x.device
    ):
        _raise_about_pair(x, k)
    _check_tables(x, cos, sin)
    if positions is not None:
        _check_positions(x, cos, positions)
    elif cos.shape[0] < x.shape[2]:
        raise ValueError(
            "cos and sin must have a row for each of x's T rows where there are no positions, got "
            + shapes_of(x=x, cos=cos)
        )
    return RotaryCall(x, k, cos, sin, positions, interleaved)


def _raise_about(name: str, t: Tensor) -> None:
    if t.dim() != 4:
        raise ValueError(f"rotary takes [B, H, T, D] tensors, got {shapes_of(**{name: t})}")
    raise TypeError(f"rotary takes float tensors, got {name} {t.dtype}")


def _raise_about_pair(q: Tensor, k: Tensor) -> None:
    check_same_device({"q": q, "k": k})
    if k.dtype != q.dtype:
        raise TypeError(f"q and k must have one dtype, got q {q.dtype} and k {k.dtype}")
    raise ValueError(
        "q [B, H, T, D] and k [B, Hkv, T, D] must share B, T and D, got " + shapes_of(q=q, k=k)
    )


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.dim() != 2 or sin.shape != cos.shape or not 1 <= cos.shape[1] <= x.shape[3] // 2:
        raise ValueError(
            "cos and sin must be [S, R/2] with 2 <= R <= D, got " + shapes_of(x=x, cos=cos, sin=sin)
        )
    if cos.dtype not in FLOATS or sin.dtype != cos.dtype:
        raise TypeError(f"cos and sin must be of one float dtype, got {cos.dtype} and {sin.dtype}")
    if cos.device != x.device or sin.device != x.device:
        check_same_device({"x": x, "cos": cos, "sin": sin})
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        raise ValueError(
            "cos and sin are constants of rotary, they can't require grad: detach them"
        )


def _check_positions(x: Tensor, cos: Tensor, positions: Tensor) -> None:
    if positions.dtype != torch.int64:
        raise TypeError(f"positions must be int64, got {positions.dtype}")
    if positions.shape != x.shape[2:3] and positions.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            "positions must be [T] or [B, T], got " + shapes_of(x=x, positions=positions)
        )
    check_same_device({"x": x, "positions": positions})
    # Elsewhere the values can't be read without a wait, or at all.
    readable = positions.is_cpu and type(positions) is Tensor and not is_compiling()
    if readable and positions.numel() and not in_transform():
        least, most = (int(bound) for bound in positions.aminmax())
        if least < 0 or most >= cos.shape[0]:
            raise ValueError(
                f"positions must be rows of the tables, 0 .. {cos.shape[0] - 1}, "
                f"got {least} .. {most}"
            )


def _triton_refuses(call: RotaryCall) -> str | None:
    if torch.float64 in (call.x.dtype, call.cos.dtype):
        return "the Triton kernel computes in fp32; float64 runs through the reference"
    if call.x.shape[3] > MAX_HEAD_DIM:
        return f"the Triton kernel takes head dims up to {MAX_HEAD_DIM}, got {call.x.shape[3]}"
    return triton_refusal(call.x)


def _shape_class(call: RotaryCall) -> tuple[str, int]:
    """Family: which pairs; size: head dim, by comparison with constants."""
    family = "interleaved" if call.interleaved else "half"
    return family, sum(1 for limit in (64, 128) if limit < call.x.shape[3])


def _never(call: RotaryCall) -> str | None:
    return None


dispatch.TABLE["rotary"] = (
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("pytorch", _never),
    dispatch.Impl("reference", _never),
)
records.SHAPE_CLASSES["rotary"] = _shape_class
records.KERNEL_SOURCES["rotary", "triton"] = (
    "triton_kernels/rotary.py",
    "triton_kernels/rotary_kernel.py",
)
