"""Attention inside each of several packed sequences on Triton: the kernels of :mod:`.attention`,
one sequence after the other.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.attention_varlen import backward_by, forward_by
from fused_lm.triton_kernels.attention import attention_backward, attention_forward


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
    """As ``fused_lm.reference.attention_varlen.attention_varlen_forward``."""
    return forward_by(
        attention_forward, q, k, v, cu_seqlens_q, cu_seqlens_k,
        lower, upper, aligned_at_end, scale, softcap,
    )  # fmt: skip


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
    """As ``fused_lm.reference.attention_varlen.attention_varlen_backward``."""
    return backward_by(
        attention_backward, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        lower, upper, aligned_at_end, scale, softcap,
    )  # fmt: skip
