"""Softmax attention by ``csrc/attention.cpp``, which allocates and launches.

Arguments are those of ``fused_lm.reference.attention``; the dispatcher refuses what is no float16
or bfloat16, and head dims that are no multiples of 8 up to 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.cuda import extension

IN_ANY_ORDER, IN_ORDER = 0, -1
"""How csrc/attention_bwd_sm90.cpp adds up dq on a Hopper; in order, with room by its tuning."""


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> out [B, H, T, Dv], lse [B, H, T]."""
    return extension.op("attention_fwd")(
        q, k, v, mask, key_mask, bias, rng, lower, upper, scale, softcap, dropout_p
    )


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dbias) with dtype and order of their tensors; dbias may be (0,).

    Hopper's kernels add up dq in any order, unless torch.use_deterministic_algorithms is set.
    """
    dq_slots = IN_ORDER if torch.are_deterministic_algorithms_enabled() else IN_ANY_ORDER
    return extension.op("attention_bwd_sm90")(
        dout, dlse, q, k, v, out, lse, mask, key_mask, bias, rng,
        lower, upper, scale, softcap, dropout_p, needs_dbias, dq_slots,
    )  # fmt: skip


def attention_weights_forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    average_heads: bool,
) -> Tensor:
    """dropout(P) as [B, H, T, S], or its mean over heads [B, T, S], in the dtype of q."""
    return extension.op("attention_weights_fwd")(
        q, k, lse, mask, key_mask, bias, rng,
        lower, upper, scale, softcap, dropout_p, average_heads,
    )  # fmt: skip
