"""Checks of a call of ``attention_varlen``, once, before any allocation and without a look into the
bounds; what each backend refuses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.attention_backends import (
    CUDA_HEADS,
    TRITON_HEAD_DIM,
    cuda_type_limit,
    no_tile,
)
from fused_lm.ops.attention_checks import CAUSAL, checked_window
from fused_lm.ops.checks import (
    FLOATS,
    autocast_enabled,
    check_same_device,
    shapes_of,
    triton_refusal,
)

CUDA_ROWS = 2**29 - 1
CUDA_TILE = 128
CUDA_TILES = 2**30 - 1
"""Limits of csrc/kernels/attention_varlen.h: rows of q or of k, and tiles of so many queries, of
all sequences and heads.
"""


class AttentionVarlenCall(NamedTuple):
    """Checked arguments of one call, in the order of
    ``torch.ops.fused_lm.attention_varlen_fwd``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lower: int | None
    upper: int | None
    aligned_at_end: bool
    scale: float
    softcap: float
    return_lse: bool


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
    return_lse: bool,
) -> AttentionVarlenCall:
    """The call with its band and the default scale; raises as the public op says."""
    _check_tensors(q, k, v)
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.dim() != 1 or bounds.numel() == 0 or bounds.is_floating_point():
            raise ValueError(
                f"{name} must be int [sequences + 1], got {bounds.dtype} "
                + shapes_of(**{name: bounds})
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q names {cu_seqlens_q.shape[0] - 1} sequences, "
            f"cu_seqlens_k {cu_seqlens_k.shape[0] - 1}"
        )
    if cu_seqlens_q.shape[0] == 1 and (q.shape[0] > 0 or k.shape[0] > 0):
        raise ValueError(f"rows of no sequence, got {shapes_of(q=q, k=k, v=v)}")
    if not isinstance(causal, str):
        causal = bool(causal)
    if causal not in CAUSAL:
        raise ValueError(
            f"causal must be False, True, 'top_left' or 'bottom_right', got {causal!r}"
        )
    if causal is True and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"causal=True is ambiguous for {q.shape[0]} queries and {k.shape[0]} keys: say "
            "causal='top_left' (row t of a sequence sees keys up to t) or causal='bottom_right' "
            "(row t sees keys up to t + S - T)"
        )
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and >= 0 (0 = none), got {softcap}")
    left, right = (None, None) if window is None else checked_window(window)
    lower = None if left is None else -left
    upper = 0 if causal else right
    at_end = causal in (False, "bottom_right") and (lower is not None or upper is not None)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return AttentionVarlenCall(
        q, k, v, cu_seqlens_q, cu_seqlens_k, lower, upper, at_end, scale, softcap, return_lse
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v}
    if any(t.dim() != 3 for t in tensors.values()):
        raise ValueError(f"attention_varlen takes [N, H, D] tensors, got {shapes_of(**tensors)}")
    check_same_device(tensors)
    dtypes = {t.dtype for t in tensors.values()}
    # Autocast narrows what is mixed, but leaves fp64 as it is.
    mixes = autocast_enabled(q.device) and torch.float64 not in dtypes
    if q.dtype not in FLOATS or not (len(dtypes) == 1 or mixes):
        raise TypeError(
            "attention_varlen takes q, k and v of one dtype of float16, bfloat16, float32, "
            "float64, got " + ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        )
    if k.shape[2] != q.shape[2] or q.shape[2] == 0:
        raise ValueError(f"q and k must share D >= 1, got {shapes_of(**tensors)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have the rows and heads of k, got {shapes_of(**tensors)}")
    H, Hkv = q.shape[1], k.shape[1]
    if Hkv != H and (Hkv == 0 or H % Hkv != 0):
        raise ValueError(f"the heads of k must divide the heads of q, got {shapes_of(**tensors)}")


def cuda_limit(call: AttentionVarlenCall) -> str | None:
    """Why the CUDA kernels can't run a call on any GPU, None if they can on some."""
    q, k = call.q, call.k
    limit = cuda_type_limit("attention_varlen", q, (q.shape[2], call.v.shape[2]))
    if limit is not None:
        return limit
    if q.shape[1] > CUDA_HEADS or q.shape[0] > CUDA_ROWS or k.shape[0] > CUDA_ROWS:
        return f"the CUDA kernels take up to {CUDA_HEADS} heads and 2^29 rows"
    return None


def one_kernel_refuses(call: AttentionVarlenCall) -> str | None:
    """Why a call that the CUDA kernels can run is no single one: then it is one per sequence."""
    if call.q.is_cuda and not extension.is_hopper(call.q):
        return "the kernel for all sequences is built for Hopper (sm_90a) alone"
    for bounds in (call.cu_seqlens_q, call.cu_seqlens_k):
        if bounds.device != call.q.device:
            return f"the kernel reads bounds where q is, got them on {bounds.device}"
        if bounds.dtype not in (torch.int32, torch.int64):
            return f"the kernel reads bounds in int32 or int64, got {bounds.dtype}"
    tiles = call.q.shape[0] // CUDA_TILE + call.cu_seqlens_q.shape[0]
    if call.k.shape[1] == 0 or tiles * call.q.shape[1] > CUDA_TILES:
        return "the kernel takes a head or more, and up to 2^30 tiles of 128 queries"
    return None


def _cuda_refuses(call: AttentionVarlenCall) -> str | None:
    return cuda_limit(call) or extension.refusal(call.q)


def _triton_refuses(call: AttentionVarlenCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    D, largest = call.q.shape[2], max(call.q.shape[2], call.v.shape[2])
    if largest > TRITON_HEAD_DIM:
        return f"the Triton kernels take head dims up to {TRITON_HEAD_DIM}, got {largest}"
    refusal = triton_refusal(call.q)
    if refusal is not None or not call.q.is_cuda:
        return refusal
    return no_tile(D, largest, call.q.element_size(), call.q.device.index, 0)


def _pytorch_refuses(call: AttentionVarlenCall) -> str | None:
    if call.return_lse:
        return "PyTorch's operator does not return lse"
    if call.softcap > 0.0:
        return "PyTorch's operator has no softcap"
    return None


def _never(call: AttentionVarlenCall) -> str | None:
    return None


_WIDTHS = (64, 96, 128, 192, 256)
"""Head dims at which one kernel gives way to another (csrc/kernels/attention_tuning_sm90.h)."""


def _shape_class(call: AttentionVarlenCall) -> tuple[str, int]:
    """Family: head dim and what costs extra; size: keys that a sequence has on average, by
    comparison with constants.
    """
    D = max(call.q.shape[2], call.v.shape[2])
    width = next((limit for limit in _WIDTHS if limit >= D), TRITON_HEAD_DIM)
    kinds = []
    if call.lower is not None or call.upper is not None:
        kinds.append("band")
    if call.softcap > 0.0:
        kinds.append("softcap")
    keys, sequences = call.k.shape[0], call.cu_seqlens_k.shape[0] - 1
    size = sum(1 for limit in (128, 512, 2048, 8192) if limit * sequences < keys)
    return f"d{width}-{'-'.join(kinds) or 'plain'}", size


dispatch.TABLE["attention_varlen"] = (
    dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("pytorch", _pytorch_refuses),
    dispatch.Impl("reference", _never),
)
records.SHAPE_CLASSES["attention_varlen"] = _shape_class
records.KERNEL_SOURCES["attention_varlen", "triton"] = (
    "triton_kernels/attention_varlen.py",
    *records.KERNEL_SOURCES["attention", "triton"],
)
records.KERNEL_SOURCES["attention_varlen", "cuda"] = (
    "attention_varlen_fwd_sm90_bf16",
    "attention_varlen_fwd_sm90_fp16",
    *(u for u in records.KERNEL_SOURCES["attention", "cuda"] if u.startswith("attention_bwd")),
)
records.TRAINING_SOURCES["attention_varlen", "cuda"] = (
    "attention_varlen_bwd_sm90_bf16",
    "attention_varlen_bwd_sm90_fp16",
    *records.TRAINING_SOURCES["attention", "cuda"],
)
