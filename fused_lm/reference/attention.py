"""Softmax attention, the derivation: every step of forward and backward as a line of plain PyTorch.

    x = scale * q k^T;  score = softcap(x) + bias;  P = softmax(score);  A = dropout(P);  out = A v
    lse = log sum exp(score), so that P = exp(score - lse) needs no second pass over the row

Backward, with dA = dout v^T and keep = A / P (0 or 1 / (1 - p)):

    dv     = A^T dout
    dP     = keep * dA
    delta  = rowsum(P * dP) - dlse = rowsum(dout * out) - dlse      (dropout cancels in the sum)
    dscore = P * (dP - delta)                                       (bias gradient: summed where it
    broadcasts) dx     = dscore * (1 - tanh(x / c)^2);  dq = scale * dx k;  dk = scale * dx^T q

A row with no visible key has out = 0, lse = -inf and P = 0. Sums are fp32 (fp64 for fp64 inputs).
Source: Dao 2023 (arXiv:2307.08691), sections 2.3 and 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.reference.layout import ordered_as
from fused_lm.reference.philox import scaled_keep


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
    score, _ = _scores(q, k, mask, key_mask, bias, lower, upper, scale, softcap)
    lse = _logsumexp(score)
    attended = _dropped(_softmax(score, lse), rng, dropout_p)
    out = attended @ _heads_of(v, q.shape[1]).to(score.dtype)
    return ordered_as(out.to(q.dtype), q), lse


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
    """Gradients (dq, dk, dv, dbias) with dtype and memory order of their tensors; dbias is empty
    unless asked for.
    """
    score, tanh = _scores(q, k, mask, key_mask, bias, lower, upper, scale, softcap)
    dtype = score.dtype
    P = _probabilities(score, lse.to(dtype))
    dout = dout.to(dtype)
    q_wide, k_wide, v_wide = (_heads_of(t, q.shape[1]).to(dtype) for t in (q, k, v))

    dv = _dropped(P, rng, dropout_p).transpose(-2, -1) @ dout
    dP = _dropped(dout @ v_wide.transpose(-2, -1), rng, dropout_p)
    delta = (dout * out.to(dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(dtype).unsqueeze(-1)
    dscore = P * (dP - delta)

    dx = dscore if tanh is None else dscore * (1 - tanh * tanh)
    dq = scale * (dx @ k_wide)
    dk = scale * (dx.transpose(-2, -1) @ q_wide)
    dbias = q.new_empty(0)
    if needs_dbias and bias is not None:
        dbias = dscore.sum_to_size(bias.shape).to(bias.dtype)
    dq, dk, dv = dq.to(q.dtype), _sum_group(dk, k), _sum_group(dv, v)
    return ordered_as(dq, q), ordered_as(dk, k), ordered_as(dv, v), dbias


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
    score, _ = _scores(q, k, mask, key_mask, bias, lower, upper, scale, softcap)
    weights = _dropped(_probabilities(score, lse.to(score.dtype)), rng, dropout_p)
    return (weights.mean(1) if average_heads else weights).to(q.dtype)


def visible(
    T: int, S: int, lower: int | None, upper: int | None, device: torch.device
) -> Tensor | None:
    """bool [T, S]: key s is inside row t's band ``t + lower <= s <= t + upper``; None if
    unbounded.
    """
    bounds = [bound for bound in (lower, upper) if bound is not None]
    if not bounds:
        return None
    distance = torch.arange(S, device=device) - torch.arange(T, device=device).unsqueeze(-1)
    if len(bounds) == 2:
        return (distance >= bounds[0]) & (distance <= bounds[1])
    return distance <= bounds[0] if lower is None else distance >= bounds[0]


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, H, T, S] in the accumulation dtype, and tanh(x / softcap) for the
    backward.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = scale * (q.to(dtype) @ _heads_of(k, q.shape[1]).to(dtype).transpose(-2, -1))
    tanh = torch.tanh(x / softcap) if softcap > 0 else None
    score = x if tanh is None else softcap * tanh
    if bias is not None:
        score = score + bias.to(dtype)
    hidden = [] if mask is None else [~mask]
    if key_mask is not None:
        hidden.append(~key_mask[:, None, None, :])
    band = visible(q.shape[2], k.shape[2], lower, upper, q.device)
    if band is not None:
        hidden.append(~band)
    for where in hidden:
        score = score.masked_fill(where, float("-inf"))
    return score, tanh


def _logsumexp(score: Tensor) -> Tensor:
    if score.shape[-1] == 0:
        return score.new_full(score.shape[:-1], float("-inf"))
    return torch.logsumexp(score, dim=-1)


def _softmax(score: Tensor, lse: Tensor) -> Tensor:
    """:func:`_probabilities` whose rows add up to 1 whatever the scores: lse of 1e4 is rounded by
    up to 5e-4, and so would be every weight.
    """
    P = _probabilities(score, lse)
    return P / P.sum(-1, keepdim=True).clamp_min(torch.finfo(P.dtype).tiny)


def _probabilities(score: Tensor, lse: Tensor) -> Tensor:
    """exp(score - lse), 0 in rows without a visible key (there -inf - -inf would be NaN)."""
    empty = torch.isneginf(lse)
    difference = score - torch.where(empty, torch.zeros_like(lse), lse).unsqueeze(-1)
    return torch.exp(difference).masked_fill(torch.isneginf(score), 0.0)


def _dropped(P: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    if rng is None or dropout_p == 0.0:
        return P
    B, H, T, S = P.shape
    return P * scaled_keep(rng, B, H, T, S, dropout_p, P.dtype)


def _heads_of(t: Tensor, H: int) -> Tensor:
    """Key or value heads repeated to H query heads (grouped-query attention)."""
    return t if t.shape[1] == H else t.repeat_interleave(H // t.shape[1], dim=1)


def _sum_group(gradient: Tensor, t: Tensor) -> Tensor:
    """The other way: gradients of repeated heads summed into the heads of ``t``."""
    if gradient.shape[1] != t.shape[1]:
        gradient = gradient.unflatten(1, (t.shape[1], -1)).sum(2)
    return gradient.to(t.dtype)
