"""Forward of softmax attention with an online softmax: out and lse in one pass over the keys.

    for each key tile:  s = scores;  m' = max(m, rowmax s);  p = e^(s - m')
                        l = l * e^(m - m') + rowsum p;  acc = acc * e^(m - m') + dropout(p) v
    out = acc / l;  lse = m + ln l

Grid: one program per (query tile, head, batch), query tile fastest, so programs that run together
share K and V in L2; longest first where an upper bound makes them unequal. Query head h reads
key-value head h // group.

Key tiles outside of the band [t + lower, t + upper] are skipped. Tiles that every row of the query
tile sees completely run in a loop without mask code; the tiles before and after them, where the
band or the keys end, in a second. With a mask or key mask everything runs in the second.

Bytes: B*H*T*(D + Dv) + (T / BLOCK_T)*B*H*S*(D + Dv) elements, the second from L2 if heads are
small, plus mask and bias once. FLOPs: 2*B*H*T*S*(D + Dv), half if causal. The row sum is of the
undropped p. Rows without a visible key keep m = -inf and l = 0: out = 0, lse = -inf.

Sources: Milakov & Gimelshein 2018 (arXiv:1805.02867) alg. 3; Dao 2023 (arXiv:2307.08691) alg. 1.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.attention_common import (
    LOG2_E,
    band_tiles,
    dropout_factor,
    load_rows,
    program_tile,
    score_tile,
    score_unit,
    store_rows,
    visible_tile,
    whole_tiles,
)


@triton.jit
def attend_to_tiles(
    row_max, row_sum, acc, q_tile, k, k_strides, v, v_strides, masks, dropout, batch, head,
    t_start, begin, end, gap_begin, gap, T, S, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over key tiles begin..end; returns the new (row_max, row_sum, acc).

    From gap_begin on, tiles are ``gap`` keys further. k, v: this head's [S, D] and [S, DV].
    row_max is in units of the score tile.
    """
    unit_log2 = score_unit(masks, scale, SOFTCAP) * LOG2_E
    rows = (t_start + tl.arange(0, BLOCK_T))[:, None]
    for position in tl.range(begin, end, BLOCK_S):
        s_start = tl.multiple_of(position + tl.where(position >= gap_begin, gap, 0), BLOCK_S)
        cols = (s_start + tl.arange(0, BLOCK_S))[None, :]
        k_tile = load_rows(k, s_start, k_strides, S, D, D_PADDED, BLOCK_S, MASKED)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        score, _tanh = score_tile(qk, masks, batch, head, rows, cols, T, S, scale, softcap, SOFTCAP)
        if MASKED:
            visible = visible_tile(masks, batch, head, rows, cols, T, S, lower, upper)
            score = tl.where(visible, score, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(score, 1))
        base = new_max
        if MASKED or masks.bias is not None:
            # -inf - -inf would be NaN in rows that have seen no key yet, or only biases of -inf.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        if masks.bias is not None or PRECISION == "ieee":
            # A bias of -1e9 would leave its rounding, 64, in the exponent of one FMA.
            p = tl.exp2((score - base[:, None]) * unit_log2)
        else:
            p = tl.exp2(score * unit_log2 - (base * unit_log2)[:, None])
        # The difference first: as an FMA of two products it would not be 0 where the maximum stays,
        # and the sum would drift by that with every tile.
        decay = tl.exp2((row_max - base) * unit_log2)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max

        p *= dropout_factor(dropout, batch, head, t_start, s_start, BLOCK_T, BLOCK_S)
        v_tile = load_rows(v, s_start, v_strides, S, DV, DV_PADDED, BLOCK_S, MASKED)
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "n_tiles"])
def attention_fwd(
    q, q_strides, k, k_strides, v, v_strides, masks, dropout, out, out_strides, lse,
    H, group, T, S, n_tiles, lower, upper, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [B, H, T, D], k [B, H/group, S, D], v [B, H/group, S, DV] -> out [B, H, T, DV], lse.

    lse [B, H, T] is contiguous; scale > 0 (the maximum is taken before scaling).
    """
    tile, head, batch = program_tile(n_tiles, H, upper is not None)
    t_start = tile * BLOCK_T
    kv_head = head // group
    q += batch * q_strides.batch + head * q_strides.head
    k += batch * k_strides.batch + kv_head * k_strides.head
    v += batch * v_strides.batch + kv_head * v_strides.head
    out += batch * out_strides.batch + head * out_strides.head
    lse += (batch * H + head) * T

    q_tile = load_rows(q, t_start, q_strides, T, D, D_PADDED, BLOCK_T, True)
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, DV_PADDED], tl.float32)

    last = tl.minimum(t_start + BLOCK_T, T) - 1
    begin, full_begin, full_end, end = band_tiles(t_start, last, S, lower, upper, BLOCK_S)
    full_begin, full_end = whole_tiles(masks, begin, full_begin, full_end)
    if masks.mask is None and masks.key_mask is None:
        row_max, row_sum, acc = attend_to_tiles(
            row_max, row_sum, acc, q_tile, k, k_strides, v, v_strides, masks, dropout, batch, head,
            t_start, full_begin, full_end, full_end, 0, T, S, lower, upper, scale, softcap,
            D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    gap = full_end - full_begin
    row_max, row_sum, acc = attend_to_tiles(
        row_max, row_sum, acc, q_tile, k, k_strides, v, v_strides, masks, dropout, batch, head,
        t_start, begin, end - gap, full_begin, gap, T, S, lower, upper, scale, softcap,
        D, DV, D_PADDED, DV_PADDED, BLOCK_T, BLOCK_S, SOFTCAP, PRECISION, True,
    )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    out_tile = acc * (1.0 / row_sum)[:, None]
    store_rows(out, out_tile, t_start, out_strides, T, DV, DV_PADDED, BLOCK_T)
    rows = t_start + tl.arange(0, BLOCK_T)
    row_lse = row_max * score_unit(masks, scale, SOFTCAP) + tl.log(row_sum)
    tl.store(lse + rows, tl.where(empty, float("-inf"), row_lse), mask=rows < T)
