"""Attention inside each of several packed sequences, the derivation: attention, one sequence after
the other.

Sequence i has rows ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1]`` of q, and of k and v likewise. Its
query t sees its keys

    t + d + lower <= s <= t + d + upper,  0 <= s < S

where d = S - T if bands are aligned at the end, and else 0. Whatever attends to one sequence, a
kernel too, becomes an operator on packed ones by :func:`forward_by` and :func:`backward_by`, which
read the bounds on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lm.reference.attention import attention_backward, attention_forward


class Sequence(NamedTuple):
    """Where one lies, and its band."""

    rows: slice
    keys: slice
    lower: int | None
    upper: int | None


def checked_bounds(name: str, bounds: Tensor, total: int) -> list[int]:
    """Bounds on the host; ValueError unless they rise from 0 to ``total``."""
    values: list[int] = bounds.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to {total}, got {values}")
    return values


def sequences_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lower: int | None,
    upper: int | None,
    aligned_at_end: bool,
) -> Iterator[Sequence]:
    """Each sequence; raises as :func:`checked_bounds`."""
    bounds_q = checked_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_k = checked_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        diagonal = keys.stop - keys.start - (rows.stop - rows.start) if aligned_at_end else 0
        yield Sequence(
            rows,
            keys,
            None if lower is None else lower + diagonal,
            None if upper is None else upper + diagonal,
        )


def forward_by(
    attention_forward: Callable[..., tuple[Tensor, Tensor]],
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
    """out [N, H, Dv] and lse [H, N] of q [N, H, D], k [M, Hkv, D], v [M, Hkv, Dv], by a forward of
    attention.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = [q.new_empty(0, q.shape[1], v.shape[2])]
    statistics = [q.new_empty(q.shape[1], 0, dtype=wide)]
    band = (lower, upper, aligned_at_end)
    for one in sequences_of(q, k, cu_seqlens_q, cu_seqlens_k, *band):
        if one.rows.start == one.rows.stop:
            continue
        out, lse = attention_forward(
            *(as_heads(q[one.rows]), as_heads(k[one.keys]), as_heads(v[one.keys])),
            *(None, None, None, None, one.lower, one.upper, scale, softcap, 0.0),
        )
        outputs.append(out[0].transpose(0, 1))
        statistics.append(lse[0])
    return torch.cat(outputs), torch.cat(statistics, dim=1)


def backward_by(
    attention_backward: Callable[..., tuple[Tensor, ...]],
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
    """dq, dk and dv with sizes and dtype of their tensors, by a backward of attention, each
    sequence's copied to their place.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    band = (lower, upper, aligned_at_end)
    for one in sequences_of(q, k, cu_seqlens_q, cu_seqlens_k, *band):
        rows, keys = one.rows, one.keys
        mine = (dq[rows], dk[keys], dv[keys])
        if rows.start == rows.stop or keys.start == keys.stop:
            for gradient in mine:
                gradient.zero_()
            continue
        found: tuple[Any, ...] = attention_backward(
            as_heads(dout[rows]),
            None if dlse is None else dlse[None, :, rows],
            *(as_heads(q[rows]), as_heads(k[keys]), as_heads(v[keys]), as_heads(out[rows])),
            lse[None, :, rows],
            *(None, None, None, None, one.lower, one.upper, scale, softcap, 0.0, False),
        )
        for gradient, heads in zip(mine, found, strict=False):
            gradient.copy_(heads[0].transpose(0, 1))
    return dq, dk, dv


def as_heads(rows: Tensor) -> Tensor:
    """[T, H, D] as attention takes it, [1, H, T, D]: a view."""
    return rows.transpose(0, 1)[None]


attention_varlen_forward = partial(forward_by, attention_forward)
"""q [N, H, D], k [M, Hkv, D], v [M, Hkv, Dv] -> out [N, H, Dv], lse [H, N]."""
attention_varlen_backward = partial(backward_by, attention_backward)
"""Gradients (dq, dk, dv) with sizes and dtype of their tensors."""
