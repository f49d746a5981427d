"""Attention inside each of several packed sequences by ``csrc/attention_varlen.cpp`` and
``attention_varlen_bwd.cpp``: one kernel for all of them, which reads the bounds on the GPU.

Arguments are those of ``fused_lm.reference.attention_varlen``; the public function refuses what is
no float16 or bfloat16, head dims that are no multiples of 8 up to 256, and GPUs but Hopper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.cuda import extension
from fused_lm.cuda.attention import attention_backward
from fused_lm.reference.attention_varlen import backward_by


def attention_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lower: int | None,
    upper: int | None,
    aligned_at_end: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """q [N, H, D], k [M, Hkv, D], v [M, Hkv, Dv] -> out [N, H, Dv], lse [H, N]."""
    return extension.op("attention_varlen_fwd")(
        q, k, v, cu_seqlens_q, cu_seqlens_k, lower, upper, aligned_at_end, scale, softcap
    )


def attention_varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lower: int | None,
    upper: int | None,
    aligned_at_end: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) with sizes and dtype of their tensors.

    The kernel adds up dq in any order. Under torch.use_deterministic_algorithms the backward of
    :mod:`.attention` has one sequence after the other, and waits for the bounds.
    """
    bounds = (cu_seqlens_q, cu_seqlens_k, lower, upper, aligned_at_end, scale, softcap)
    if torch.are_deterministic_algorithms_enabled():
        return backward_by(attention_backward, dout, dlse, q, k, v, out, lse, *bounds)
    return extension.op("attention_varlen_bwd")(dout, dlse, q, k, v, out, lse, *bounds)
