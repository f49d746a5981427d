"""Gradient of the attention bias: dscore, summed over the dims the bias is broadcast along.

    dscore = P * (dropout(dout V^T) - delta),   P = exp(score - lse)

One program owns one tile of the bias gradient and walks, in a fixed order, over all (batch, head,
query tile, key tile) that share it: no atomics, bitwise repeatable. A dim that isn't broadcast
contributes one step, so a full bias [B, H, T, S] is one step per program and [1, H, T, S] is B
steps. A bias of one element is a single program: correct, and slow.

Grid: n(batch) * n(head) * n(query tiles) * n(key tiles) of the bias, key tile fastest.
FLOPs: 2*B*H*T*S*(D + Dv). Bytes: the bias once; q, k, v, dout once per tile they meet, from L2.
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


@triton.jit(do_not_specialize=["B", "T", "S", "lower", "upper"])
def attention_bwd_dbias(
    q, q_strides, k, k_strides, v, v_strides, dout, dout_strides, lse, delta, masks, dropout,
    dbias, dbias_strides, B, H, group, T, S, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_T: tl.constexpr, SUM_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias: contiguous, size 1 along every dim whose SUM flag is set; its strides are 0 there."""
    t_tiles, s_tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(S, BLOCK_S)
    # Steps of the walk along each dim, and where this program's tile stands along it.
    b_steps = B if SUM_B else 1
    h_steps = H if SUM_H else 1
    t_steps = t_tiles if SUM_T else 1
    s_steps = s_tiles if SUM_S else 1
    pid = tl.program_id(0)
    own_s = pid % (1 if SUM_S else s_tiles)
    pid = pid // (1 if SUM_S else s_tiles)
    own_t = pid % (1 if SUM_T else t_tiles)
    pid = pid // (1 if SUM_T else t_tiles)
    own_h = pid % (1 if SUM_H else H)
    own_b = pid // (1 if SUM_H else H)

    steps = b_steps * h_steps * t_steps * s_steps
    if not SUM_T and not SUM_S:
        t_first = own_t * BLOCK_T
        t_last = tl.minimum(t_first + BLOCK_T, T) - 1
        begin, _full_begin, _full_end, end = band_tiles(t_first, t_last, S, lower, upper, BLOCK_S)
        hidden = (own_s * BLOCK_S >= end) | (own_s * BLOCK_S < begin)
        steps = tl.where(hidden, 0, steps)

    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for step in tl.range(0, steps):
        s_start = (own_s + step % s_steps) * BLOCK_S
        t_start = (own_t + step // s_steps % t_steps) * BLOCK_T
        head = (own_h + step // (s_steps * t_steps) % h_steps).to(tl.int64)
        batch = (own_b + step // (s_steps * t_steps * h_steps)).to(tl.int64)
        kv_head = head // group
        rows = t_start + tl.arange(0, BLOCK_T)
        cols = s_start + tl.arange(0, BLOCK_S)
        head_q = q + batch * q_strides.batch + head * q_strides.head
        head_k = k + batch * k_strides.batch + kv_head * k_strides.head
        head_v = v + batch * v_strides.batch + kv_head * v_strides.head
        head_dout = dout + batch * dout_strides.batch + head * dout_strides.head
        offset = (batch * H + head) * T

        q_tile = load_rows(head_q, t_start, q_strides, T, D, D_PADDED, BLOCK_T, True)
        k_tile = load_rows(head_k, s_start, k_strides, S, D, D_PADDED, BLOCK_S, True)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        row_lse = load_lse(lse + offset, masks, rows, T, PRECISION)
        p, _tanh = probability_tile(
            qk, row_lse[:, None], masks, batch, head, rows[:, None], cols[None, :], T, S,
            lower, upper, scale, softcap, SOFTCAP, PRECISION, True,
        )  # fmt: skip
        dout_tile = load_rows(head_dout, t_start, dout_strides, T, DV, DV_PADDED, BLOCK_T, True)
        v_tile = load_rows(head_v, s_start, v_strides, S, DV, DV_PADDED, BLOCK_S, True)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        dp *= dropout_factor(dropout, batch, head, t_start, s_start, BLOCK_T, BLOCK_S)
        row_delta = tl.load(delta + offset + rows, mask=rows < T, other=0.0)
        acc += p * (dp - row_delta[:, None])

    if SUM_T:
        acc = tl.sum(acc, 0, keep_dims=True)
    if SUM_S:
        acc = tl.sum(acc, 1, keep_dims=True)
    rows = tl.arange(0, 1 if SUM_T else BLOCK_T) + own_t * BLOCK_T
    cols = tl.arange(0, 1 if SUM_S else BLOCK_S) + own_s * BLOCK_S
    dbias += own_b.to(tl.int64) * dbias_strides.batch + own_h.to(tl.int64) * dbias_strides.head
    pointers = dbias + rows.to(tl.int64)[:, None] * dbias_strides.row
    pointers = pointers + cols.to(tl.int64)[None, :] * dbias_strides.col
    inside = (rows < T)[:, None] & (cols < S)[None, :]
    tl.store(pointers, acc.to(dbias.dtype.element_ty), mask=inside)
