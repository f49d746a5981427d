"""Backward of softmax attention: delta, then dK and dV by key tiles, then dQ by query tiles.

    P  = exp(score - lse)                     recomputed tile by tile
    dV = dropout(P)^T dout                    dP = dropout(dout V^T)
    delta  = rowsum(dout * out) - dlse        dscore = P * (dP - delta)
    dx = dscore * (1 - tanh^2)                dQ = scale * dx K,  dK = scale * dx^T Q

Two kernels instead of one with atomics: 7 products instead of 5, but bitwise repeatable and without
a fp32 workspace. dK/dV works on transposed tiles, so that P^T and dx^T go from the accumulators of
one product into the next as its left operand, without shared memory.

Grids: delta and dQ one program per (query tile, head, batch), dK/dV per (key tile, key-value head,
batch), where one loop runs over the query tiles of all heads of its group. Tiles outside of the
band are skipped, completely visible ones run without mask code, as in the forward.

FLOPs: 2*B*H*T*S*(4*D + 3*Dv). Bytes: delta 2*B*H*T*Dv elements; dK/dV re-reads q and dout once per
key tile, dQ re-reads k and v once per query tile.

Rows at or after T and rows without a key have lse = +inf, hence P = 0, without a mask.

Source: Dao 2023 (arXiv:2307.08691) alg. 2.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.attention_common import (
    band_tiles,
    dropout_factor,
    load_lse,
    load_rows,
    probability_tile,
    program_tile,
    store_rows,
    whole_tiles,
)


@triton.jit(do_not_specialize=["T", "n_tiles"])
def attention_bwd_delta(
    out, out_strides, dout, dout_strides, dlse, dlse_strides, delta, H, T, n_tiles,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] fp32, contiguous = rowsum(dout * out) - dlse; out, dout [B, H, T, DV]."""
    tile, head, batch = program_tile(n_tiles, H, False)
    t_start = tile * BLOCK_T
    out += batch * out_strides.batch + head * out_strides.head
    dout += batch * dout_strides.batch + head * dout_strides.head
    out_tile = load_rows(out, t_start, out_strides, T, DV, DV_PADDED, BLOCK_T, True)
    dout_tile = load_rows(dout, t_start, dout_strides, T, DV, DV_PADDED, BLOCK_T, True)
    value = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    rows = t_start + tl.arange(0, BLOCK_T)
    if dlse is not None:
        dlse += batch * dlse_strides.batch + head * dlse_strides.head
        dlse = dlse + rows.to(tl.int64) * dlse_strides.row
        value -= tl.load(dlse, mask=rows < T, other=0.0).to(tl.float32)
    tl.store(delta + (batch * H + head) * T + rows, value, mask=rows < T)


@triton.jit
def accumulate_dkdv(
    dk, dv, k_tile, v_tile, q, q_strides, dout, dout_strides, lse, delta, masks, dropout,
    batch, kv_head, group, s_start, begin, end, gap_begin, gap, T, S, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds query tiles begin..end of a group's heads to dk [BLOCK_S, D] (without scale) and dv.

    From gap_begin on, tiles are ``gap`` rows further. q, dout, lse, delta: pointers to this batch.
    """
    cols = (s_start + tl.arange(0, BLOCK_S))[:, None]
    n_tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T)
    for step in tl.range(0, n_tiles * group):
        head = kv_head * group + step // n_tiles
        position = begin + step % n_tiles * BLOCK_T
        t_start = tl.multiple_of(position + tl.where(position >= gap_begin, gap, 0), BLOCK_T)
        rows = t_start + tl.arange(0, BLOCK_T)
        q_head, dout_head = q + head * q_strides.head, dout + head * dout_strides.head
        q_tile = load_rows(q_head, t_start, q_strides, T, D, D_PADDED, BLOCK_T, MASKED)
        qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        row_lse = load_lse(lse + head * T, masks, rows, T, PRECISION)
        p, tanh_tile = probability_tile(
            qk, row_lse[None, :], masks, batch, head, rows[None, :], cols, T, S, lower, upper,
            scale, softcap, SOFTCAP, PRECISION, MASKED,
        )  # fmt: skip

        factor = dropout_factor(dropout, batch, head, t_start, s_start, BLOCK_T, BLOCK_S)
        if dropout is not None:
            factor = tl.trans(factor)
        dout_tile = load_rows(dout_head, t_start, dout_strides, T, DV, DV_PADDED, BLOCK_T, MASKED)
        dv = tl.dot((p * factor).to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)

        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
        dx = p * (dp * factor - row_delta[None, :])
        if SOFTCAP:
            dx *= 1.0 - tanh_tile * tanh_tile
        dk = tl.dot(dx.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "n_tiles"])
def attention_bwd_dkdv(
    q, q_strides, k, k_strides, v, v_strides, dout, dout_strides, lse, delta, masks, dropout,
    dk, dk_strides, dv, dv_strides, H, group, T, S, n_tiles, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B, H/group, S, D] and dv [B, H/group, S, DV]."""
    tile, kv_head, batch = program_tile(n_tiles, H // group, False)
    s_start = tile * BLOCK_S
    q += batch * q_strides.batch
    k += batch * k_strides.batch + kv_head * k_strides.head
    v += batch * v_strides.batch + kv_head * v_strides.head
    dout += batch * dout_strides.batch
    lse += batch * H * T
    delta += batch * H * T
    k_tile = load_rows(k, s_start, k_strides, S, D, D_PADDED, BLOCK_S, True)
    v_tile = load_rows(v, s_start, v_strides, S, DV, DV_PADDED, BLOCK_S, True)
    dk_acc = tl.zeros([BLOCK_S, D_PADDED], tl.float32)
    dv_acc = tl.zeros([BLOCK_S, DV_PADDED], tl.float32)

    # From a key's side row t is visible iff s - upper <= t <= s - lower.
    last = tl.minimum(s_start + BLOCK_S, S) - 1
    row_lower = None if upper is None else -upper
    row_upper = None if lower is None else -lower
    begin, full_begin, full_end, end = band_tiles(s_start, last, T, row_lower, row_upper, BLOCK_T)
    full_begin, full_end = whole_tiles(masks, begin, full_begin, full_end)
    if masks.mask is None and masks.key_mask is None:
        dk_acc, dv_acc = accumulate_dkdv(
            dk_acc, dv_acc, k_tile, v_tile, q, q_strides, dout, dout_strides, lse, delta,
            masks, dropout, batch, kv_head, group, s_start, full_begin, full_end, full_end, 0,
            T, S, lower, upper, scale, softcap,
            D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    gap = full_end - full_begin
    dk_acc, dv_acc = accumulate_dkdv(
        dk_acc, dv_acc, k_tile, v_tile, q, q_strides, dout, dout_strides, lse, delta,
        masks, dropout, batch, kv_head, group, s_start, begin, end - gap, full_begin, gap,
        T, S, lower, upper, scale, softcap,
        D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    dk += batch * dk_strides.batch + kv_head * dk_strides.head
    dv += batch * dv_strides.batch + kv_head * dv_strides.head
    store_rows(dk, dk_acc * scale, s_start, dk_strides, S, D, D_PADDED, BLOCK_S)
    store_rows(dv, dv_acc, s_start, dv_strides, S, DV, DV_PADDED, BLOCK_S)


@triton.jit
def accumulate_dq(
    dq, q_tile, dout_tile, row_lse, row_delta, k, k_strides, v, v_strides, masks, dropout,
    batch, head, t_start, begin, end, gap_begin, gap, T, S, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds key tiles begin..end to dq [BLOCK_T, D] (without scale).

    From gap_begin on, tiles are ``gap`` keys further. k, v: this head's [S, D] and [S, DV].
    """
    rows = (t_start + tl.arange(0, BLOCK_T))[:, None]
    for position in tl.range(begin, end, BLOCK_S):
        s_start = tl.multiple_of(position + tl.where(position >= gap_begin, gap, 0), BLOCK_S)
        cols = (s_start + tl.arange(0, BLOCK_S))[None, :]
        k_tile = load_rows(k, s_start, k_strides, S, D, D_PADDED, BLOCK_S, MASKED)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        p, tanh_tile = probability_tile(
            qk, row_lse[:, None], masks, batch, head, rows, cols, T, S, lower, upper,
            scale, softcap, SOFTCAP, PRECISION, MASKED,
        )  # fmt: skip

        v_tile = load_rows(v, s_start, v_strides, S, DV, DV_PADDED, BLOCK_S, MASKED)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        dp *= dropout_factor(dropout, batch, head, t_start, s_start, BLOCK_T, BLOCK_S)
        dx = p * (dp - row_delta[:, None])
        if SOFTCAP:
            dx *= 1.0 - tanh_tile * tanh_tile
        dq = tl.dot(dx.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "n_tiles"])
def attention_bwd_dq(
    q, q_strides, k, k_strides, v, v_strides, dout, dout_strides, lse, delta, masks, dropout,
    dq, dq_strides, H, group, T, S, n_tiles, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, H, T, D]."""
    tile, head, batch = program_tile(n_tiles, H, upper is not None)
    t_start = tile * BLOCK_T
    kv_head = head // group
    q += batch * q_strides.batch + head * q_strides.head
    k += batch * k_strides.batch + kv_head * k_strides.head
    v += batch * v_strides.batch + kv_head * v_strides.head
    dout += batch * dout_strides.batch + head * dout_strides.head
    offset = (batch * H + head) * T

    rows = t_start + tl.arange(0, BLOCK_T)
    q_tile = load_rows(q, t_start, q_strides, T, D, D_PADDED, BLOCK_T, True)
    dout_tile = load_rows(dout, t_start, dout_strides, T, DV, DV_PADDED, BLOCK_T, True)
    row_lse = load_lse(lse + offset, masks, rows, T, PRECISION)
    row_delta = tl.load(delta + offset + rows, mask=rows < T, other=0.0)
    acc = tl.zeros([BLOCK_T, D_PADDED], tl.float32)

    last = tl.minimum(t_start + BLOCK_T, T) - 1
    begin, full_begin, full_end, end = band_tiles(t_start, last, S, lower, upper, BLOCK_S)
    full_begin, full_end = whole_tiles(masks, begin, full_begin, full_end)
    if masks.mask is None and masks.key_mask is None:
        acc = accumulate_dq(
            acc, q_tile, dout_tile, row_lse, row_delta, k, k_strides, v, v_strides,
            masks, dropout, batch, head, t_start, full_begin, full_end, full_end, 0,
            T, S, lower, upper, scale, softcap,
            D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    gap = full_end - full_begin
    acc = accumulate_dq(
        acc, q_tile, dout_tile, row_lse, row_delta, k, k_strides, v, v_strides,
        masks, dropout, batch, head, t_start, begin, end - gap, full_begin, gap,
        T, S, lower, upper, scale, softcap,
        D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    dq += batch * dq_strides.batch + head * dq_strides.head
    store_rows(dq, acc * scale, t_start, dq_strides, T, D, D_PADDED, BLOCK_T)
