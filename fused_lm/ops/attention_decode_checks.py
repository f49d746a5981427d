"""Checks of a call of ``attention_decode``, once, before any allocation; what each backend
refuses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.ops.attention_backends import (
    CUDA_HEADS,
    CUDA_LENGTH,
    TRITON_HEAD_DIM,
    cuda_type_limit,
    no_tile,
)
from fused_lm.ops.attention_checks import checked_window
from fused_lm.ops.checks import (
    FLOATS,
    autocast_enabled,
    check_same_device,
    shapes_of,
    triton_refusal,
)
from fused_lm.ops.registration import in_transform

INTEGERS = (torch.int32, torch.int64)


class AttentionDecodeCall(NamedTuple):
    """Checked arguments of one call, in the order of
    ``torch.ops.fused_lm.attention_decode_fwd``.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    block_table: Tensor | None
    lower: int | None
    upper: int | None
    scale: float
    softcap: float
    return_lse: bool

    @property
    def keys(self) -> int:
        """S, the most keys that a sequence can have."""
        size = self.k_cache.shape[2]
        return size if self.block_table is None else size * self.block_table.shape[1]


def checked_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
    return_lse: bool,
) -> AttentionDecodeCall:
    """The call with its band and the default scale; raises as the public op says."""
    _check_tensors(q, k_cache, v_cache)
    _check_places(q, k_cache, cache_lens, block_table)
    if not isinstance(causal, bool):
        raise ValueError(
            f"causal must be True (queries end where the keys do) or False, got {causal!r}"
        )
    left, right = (None, None) if window is None else checked_window(window)
    if causal and right:
        raise ValueError(
            f"attention_decode sees nothing after a row: right must be 0, got {window}; "
            "or say causal=False"
        )
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and >= 0 (0 = none), got {softcap}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lower = None if left is None else -left
    upper = 0 if causal else right
    return AttentionDecodeCall(
        q, k_cache, v_cache, cache_lens, block_table, lower, upper, scale, softcap, return_lse
    )


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if any(t.dim() != 4 for t in tensors.values()):
        raise ValueError(f"attention_decode takes tensors of four dims, got {shapes_of(**tensors)}")
    check_same_device(tensors)
    dtypes = {t.dtype for t in tensors.values()}
    # Autocast narrows what is mixed, but leaves fp64 as it is.
    mixes = autocast_enabled(q.device) and torch.float64 not in dtypes
    if q.dtype not in FLOATS or not (len(dtypes) == 1 or mixes):
        raise TypeError(
            "attention_decode takes q, k_cache and v_cache of one dtype of float16, bfloat16, "
            "float32, float64, got " + ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        )
    if k_cache.shape[3] != q.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k_cache must share D >= 1, got {shapes_of(**tensors)}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must have all dims of k_cache but the last, got {shapes_of(**tensors)}"
        )
    H, Hkv = q.shape[1], k_cache.shape[1]
    if Hkv == 0 or H % Hkv != 0:
        raise ValueError(
            f"the heads of k_cache must divide the heads of q, got {shapes_of(**tensors)}"
        )


def _check_places(
    q: Tensor, k_cache: Tensor, cache_lens: Tensor, block_table: Tensor | None
) -> None:
    """Lengths and blocks."""
    if cache_lens.shape != q.shape[:1] or cache_lens.dtype not in INTEGERS:
        raise (TypeError if cache_lens.dtype not in INTEGERS else ValueError)(
            f"cache_lens must be int32 or int64 [B], got {cache_lens.dtype} "
            + shapes_of(cache_lens=cache_lens, q=q)
        )
    check_same_device({"q": q, "cache_lens": cache_lens})
    if block_table is None:
        if k_cache.shape[0] != q.shape[0]:
            raise ValueError(
                "k_cache must be [B, Hkv, S, D] of q's batch where there is no block_table, got "
                + shapes_of(q=q, k_cache=k_cache)
            )
        return
    if block_table.dtype not in INTEGERS:
        raise TypeError(f"block_table must be int32 or int64, got {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or k_cache.shape[2] == 0:
        raise ValueError(
            "block_table must be [B, blocks] of blocks with a row or more, got "
            + shapes_of(block_table=block_table, q=q, k_cache=k_cache)
        )
    check_same_device({"q": q, "block_table": block_table})
    # Elsewhere the values can't be read without a wait, or at all.
    plain = type(block_table) is Tensor and type(cache_lens) is Tensor
    if plain and block_table.is_cpu and not is_compiling() and not in_transform():
        _check_blocks(block_table, cache_lens, k_cache)


def _check_blocks(block_table: Tensor, cache_lens: Tensor, k_cache: Tensor) -> None:
    first_key = torch.arange(block_table.shape[1]) * k_cache.shape[2]
    used = block_table[first_key < cache_lens[:, None]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < k_cache.shape[0]:
        raise ValueError(
            f"block_table must name blocks 0 .. {k_cache.shape[0] - 1} up to each sequence's end, "
            f"got {int(used.min())} .. {int(used.max())}"
        )


def cuda_limit(call: AttentionDecodeCall) -> str | None:
    """Why the CUDA kernels can't run a call on any GPU, None if they can on some."""
    q, S = call.q, call.keys
    limit = cuda_type_limit("attention_decode", q, (q.shape[3], call.v_cache.shape[3]))
    if limit is not None:
        return limit
    rows = q.shape[1] // call.k_cache.shape[1] * q.shape[2]
    if call.k_cache.shape[1] > CUDA_HEADS or rows + S > CUDA_LENGTH:
        return f"the CUDA kernels take up to {CUDA_HEADS} key heads and 2^31 queries and keys"
    return None


def _cuda_refuses(call: AttentionDecodeCall) -> str | None:
    return cuda_limit(call) or extension.refusal(call.q)


def _triton_refuses(call: AttentionDecodeCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "the Triton kernels compute in fp32; float64 runs through the reference"
    D, largest = call.q.shape[3], max(call.q.shape[3], call.v_cache.shape[3])
    if largest > TRITON_HEAD_DIM:
        return f"the Triton kernels take head dims up to {TRITON_HEAD_DIM}, got {largest}"
    refusal = triton_refusal(call.q)
    if refusal is not None or not call.q.is_cuda:
        return refusal
    mask_bytes = 1
    return no_tile(D, largest, call.q.element_size(), call.q.device.index, mask_bytes)


def _pytorch_refuses(call: AttentionDecodeCall) -> str | None:
    if call.return_lse:
        return "PyTorch's operator does not return lse"
    if call.softcap > 0.0:
        return "PyTorch's operator has no softcap"
    return None


def _never(call: AttentionDecodeCall) -> str | None:
    return None


_WIDTHS = (32, 64, 96, 128, 192, 256)
"""Head dims at which one kernel gives way to another (csrc/kernels/attention_tuning.h)."""


def _shape_class(call: AttentionDecodeCall) -> tuple[str, int]:
    """Family: head dim and how keys are found; size: keys of a sequence, by comparison with
    constants.
    """
    D, S = max(call.q.shape[3], call.v_cache.shape[3]), call.keys
    width = next((limit for limit in _WIDTHS if limit >= D), TRITON_HEAD_DIM)
    kinds = ["dense" if call.block_table is None else "paged"]
    if call.lower is not None:
        kinds.append("window")
    if call.softcap > 0.0:
        kinds.append("softcap")
    return f"d{width}-{'-'.join(kinds)}", sum(1 for limit in (2048, 8192, 32768) if limit < S)


dispatch.TABLE["attention_decode"] = (
    dispatch.Impl("cuda", _cuda_refuses, needs_record=True),
    dispatch.Impl("triton", _triton_refuses, needs_record=True),
    dispatch.Impl("pytorch", _pytorch_refuses),
    dispatch.Impl("reference", _never),
)
records.SHAPE_CLASSES["attention_decode"] = _shape_class
records.KERNEL_SOURCES["attention_decode", "triton"] = (
    "triton_kernels/attention_decode.py",
    *records.KERNEL_SOURCES["attention", "triton"],
)
records.KERNEL_SOURCES["attention_decode", "cuda"] = (
    "attention_decode_sm80_bf16",
    "attention_decode_sm80_fp16",
)
