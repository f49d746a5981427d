"""What each backend refuses of ``attention`` and ``attention_weights``, and what a record says."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.attention_checks import AttentionCall
from fused_lm.ops.checks import autocast_enabled, triton_refusal

TRITON_HEAD_DIM = 512
CUDA_HEAD_DIM = 256
CUDA_HEAD_STEP = 8
CUDA_HEADS = 65535
CUDA_LENGTH = 2**31 - 257
"""Limits of csrc/kernels/attention.h; the last one is of T + S."""


def _pytorch_refuses(call: AttentionCall) -> str | None:
    if call.return_lse:
        return "PyTorch's operator does not return lse"
    if call.softcap > 0.0:
        return "PyTorch's operator has no softcap"
    if call.rng is not None and call.dropout_p > 0.0:
        return "PyTorch's operator draws its own dropout mask, not that of rng"
    return None


def cuda_limit(call: Any) -> str | None:
    """Why the CUDA kernels can't run a call on any GPU, None if they can on some."""
    q, k = call.q, call.k
    dims = [q.shape[3]] + ([call.v.shape[3]] if isinstance(call, AttentionCall) else [])
    limit = cuda_type_limit("attention", q, dims)
    if limit is not None:
        return limit
    if getattr(call, "lse", None) is not None and call.lse.dtype != torch.float32:
        return (
            f"the CUDA kernels take lse as attention returns it, in float32, got {call.lse.dtype}"
        )
    if call.bias is not None and call.bias.dtype == torch.float64:
        return "the CUDA kernels take a bias of float16, bfloat16 or float32, got torch.float64"
    if q.shape[1] > CUDA_HEADS or q.shape[2] + k.shape[2] > CUDA_LENGTH:
        return f"the CUDA kernels take up to {CUDA_HEADS} heads and 2^31 queries and keys"
    return None


def cuda_type_limit(op: str, q: Tensor, head_dims: Iterable[int]) -> str | None:
    """The same of an operator's dtype, as autocast has it, and head dims."""
    dtype = q.dtype
    if dtype != torch.float64 and autocast_enabled(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels of {op} take float16 and bfloat16, got {dtype}"
    for dim in head_dims:
        if dim % CUDA_HEAD_STEP or not 0 < dim <= CUDA_HEAD_DIM:
            return (
                f"the CUDA kernels of {op} take head dims that are multiples of "
                f"{CUDA_HEAD_STEP} up to {CUDA_HEAD_DIM}, got {dim}"
            )
    return None


def _cuda_refuses(call: Any) -> str | None:
    return cuda_limit(call) or extension.refusal(call.q)


def _triton_refuses(call: Any) -> str | None:
    if call.q.dtype == torch.float64:
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    largest = call.q.shape[3]
    if isinstance(call, AttentionCall) and call.v.shape[3] > largest:
        largest = call.v.shape[3]
    if largest > TRITON_HEAD_DIM:
        return f"the Triton kernels take head dims up to {TRITON_HEAD_DIM}, got {largest}"
    refusal = triton_refusal(call.q)
    if refusal is not None or not call.q.is_cuda:
        return refusal
    score_bytes = sum(t.element_size() for t in (call.mask, call.bias) if t is not None)
    return no_tile(
        call.q.shape[3], largest, call.q.element_size(), call.q.device.index, score_bytes
    )


@functools.lru_cache(maxsize=1024)
def _no_tile_on(D: int, Dv: int, element: int, index: int | None, score_bytes: int) -> str | None:
    from fused_lm.triton_kernels import attention_tuning, launch

    major, minor = torch.cuda.get_device_capability(index)
    limit = launch.shared_memory_limit(major * 10 + minor)
    return attention_tuning.refuses(D, Dv, element, limit, score_bytes)


def no_tile(D: int, Dv: int, element: int, index: int | None, score_bytes: int) -> str | None:
    """Why no tile of the tuning table fits this GPU's shared memory; a constant to Dynamo."""
    return _no_tile_on(D, Dv, element, index, score_bytes)


no_tile._dynamo_marked_constant = True  # type: ignore[attr-defined]


_WIDTHS = (32, 64, 96, 128, 192, 256)
"""Head dims at which one kernel gives way to another (csrc/kernels/attention_tuning.h)."""


def _shape_class(call: Any) -> tuple[str, int]:
    """Family: head dim and what costs extra; size: keys a row can see, by comparison with
    constants.
    """
    D, S = call.q.shape[3], call.k.shape[2]
    if isinstance(call, AttentionCall) and call.v.shape[3] > D:
        D = call.v.shape[3]
    width = next((limit for limit in _WIDTHS if limit >= D), TRITON_HEAD_DIM)
    kinds = []
    if call.mask is not None or call.key_mask is not None:
        kinds.append("mask")
    if call.bias is not None:
        kinds.append("bias")
    if call.lower is not None or call.upper is not None:
        kinds.append("band")
    if call.softcap > 0.0:
        kinds.append("softcap")
    if call.dropout_p > 0.0:
        kinds.append("dropout")
    size = sum(1 for limit in (512, 2048, 8192) if limit < S)
    return f"d{width}-{'-'.join(kinds) or 'plain'}", size


def _never(call: Any) -> str | None:
    return None


_KERNELS = tuple(
    f"triton_kernels/{name}.py"
    for name in (
        "launch",
        "attention",
        "attention_common",
        "attention_fwd",
        "attention_bwd",
        "attention_dbias",
        "attention_weights",
        "attention_tuning",
        "philox",
        "tanh",
    )
)
dispatch.TABLE["attention"] = (
    dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("pytorch", _pytorch_refuses),
    dispatch.Impl("reference", _never),
)
dispatch.TABLE["attention_weights"] = (
    dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("reference", _never),
)
for _op in ("attention", "attention_weights"):
    records.SHAPE_CLASSES[_op] = _shape_class
    records.KERNEL_SOURCES[_op, "triton"] = _KERNELS
records.KERNEL_SOURCES["attention", "cuda"] = (
    "attention_fwd_sm80_bf16",
    "attention_fwd_sm80_fp16",
    "attention_fwd_sm90_bf16",
    "attention_fwd_sm90_fp16",
    "attention_bwd_delta",
    "attention_bwd_dkdv_sm80_bf16",
    "attention_bwd_dkdv_sm80_fp16",
    "attention_bwd_dq_sm80_bf16",
    "attention_bwd_dq_sm80_fp16",
    "attention_dbias_sm80_bf16",
    "attention_dbias_sm80_fp16",
)
records.TRAINING_SOURCES["attention", "cuda"] = (
    "attention_bwd_sm90_bf16",
    "attention_bwd_sm90_fp16",
    "attention_bwd_wide_sm90_bf16",
    "attention_bwd_wide_sm90_fp16",
)
records.KERNEL_SOURCES["attention_weights", "cuda"] = (
    "attention_weights_sm80_bf16",
    "attention_weights_sm80_fp16",
)
