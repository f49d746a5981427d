"""The attention weights as a tensor, recomputed from lse: for callers who ask to look at them.

    weights = dropout(exp(score - lse))    [B, H, T, S], or its mean over heads [B, T, S]

Grid: one program per (key tile, query tile, head, batch); for the mean one per (key tile, query
tile, batch) that loops over the heads in registers, so nothing of size B*H*T*S is ever stored.
Tiles outside of the band are written as zeros without being computed.

FLOPs: 2*B*H*T*S*D. Bytes: the output once; q and k from L2.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.attention_common import (
    band_tiles,
    dropout_factor,
    load_lse,
    load_rows,
    probability_tile,
)


@triton.jit(do_not_specialize=["T", "S", "lower", "upper"])
def attention_weights(
    q, q_strides, k, k_strides, lse, masks, dropout, weights,
    H, group, T, S, lower, upper, scale, softcap,
    D: tl.constexpr, D_PADDED: tl.constexpr, AVERAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights: contiguous [B, H, T, S], or [B, T, S] if AVERAGE."""
    t_tiles, s_tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    s_start = pid % s_tiles * BLOCK_S
    t_start = pid // s_tiles % t_tiles * BLOCK_T
    out_index = (pid // (s_tiles * t_tiles)).to(tl.int64)
    if AVERAGE:
        batch, first_head, heads = out_index, out_index * 0, H
    else:
        batch, first_head, heads = out_index // H, out_index % H, 1

    t_last = tl.minimum(t_start + BLOCK_T, T) - 1
    begin, _full_begin, _full_end, end = band_tiles(t_start, t_last, S, lower, upper, BLOCK_S)
    heads_to_do = tl.where((s_start >= end) | (s_start < begin), 0, heads)

    rows = t_start + tl.arange(0, BLOCK_T)
    cols = s_start + tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for step in tl.range(0, heads_to_do):
        head = first_head + step
        head_q = q + batch * q_strides.batch + head * q_strides.head
        head_k = k + batch * k_strides.batch + head // group * k_strides.head
        q_tile = load_rows(head_q, t_start, q_strides, T, D, D_PADDED, BLOCK_T, True)
        k_tile = load_rows(head_k, s_start, k_strides, S, D, D_PADDED, BLOCK_S, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        row_lse = load_lse(lse + (batch * H + head) * T, masks, rows, T, PRECISION)
        p, _tanh = probability_tile(
            qk, row_lse[:, None], masks, batch, head, rows[:, None], cols[None, :], T, S,
            lower, upper, scale, softcap, SOFTCAP, PRECISION, True,
        )  # fmt: skip
        acc += p * dropout_factor(dropout, batch, head, t_start, s_start, BLOCK_T, BLOCK_S)

    if AVERAGE:
        acc = acc / H
    pointers = weights + out_index * T * S + rows.to(tl.int64)[:, None] * S + cols[None, :]
    inside = (rows < T)[:, None] & (cols < S)[None, :]
    tl.store(pointers, acc.to(weights.dtype.element_ty), mask=inside)
