"""Cross entropy with label smoothing, z-loss and softcap: loss and gradient in one pass.

    s    = softcap * tanh(logits / softcap)                           without softcap: the logits
    m, l = max_j s_j, sum_j exp(s_j - m);   lse = m + log(l)
    loss = (1 - eps) * (m - s_t) + eps * (m - mean(s)) + log(l) + z_loss * lse^2
    dlogits_j = w * ((1 + 2 z_loss lse) * exp(s_j - m) / l - (1 - eps) * [j = t] - eps / V)
                  * (1 - (s_j / softcap)^2)

m and log(l) stay apart: their sum has no digits left for a loss of 0.1 under logits of 1e4.

Grid, ``cross_entropy_rows_kernel``: one program per ROWS whole rows, tile [ROWS, BLOCK_V] in
registers, BLOCK_V >= V: logits are read once.
Grid, ``cross_entropy_wide_kernel``: one program per row. The first sweep takes m, l and sum(s), the
second one, backwards because the last columns are the freshest in the L2, the gradient. Programs
are large so that the rows in flight fit the L2 and the second sweep reads no HBM.

A wide row is a body of whole tiles that starts where the address is a multiple of ALIGN elements,
and an edge: up to ALIGN - 1 columns before it, the rest behind it. A vocabulary of 50257 puts every
row at another alignment; the body needs no masks and loads 16 bytes at once all the same. A tile is
[LANES, ALIGN]: m and l are kept per lane, so a tile costs one exponential per element, one more per
lane, and no exchange between threads; lanes meet once a row.

Rows with ignore_index read no logits. A target out of range reads nothing out of bounds: loss and
gradient of the row are NaN. In place works: a column is loaded before its own gradient is stored.

Bytes per logit of b bytes: b for the loss, 2b for loss and gradient (forward and backward apart:
3b). Per row 8 bytes of target and 4 of loss.

Source: Milakov, Gimelshein 2018 (arXiv:1805.02867), the running maximum.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.tanh import tanh

ALIGN = tl.constexpr(8)
"""Elements: 16 bytes of 16-bit logits."""


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """(s, tanh): the scores, and x / softcap after tanh, which is x itself without softcap."""
    t = x
    if SOFTCAP:
        t = tanh(x / softcap)
        x = t * softcap
    return x, t


@triton.jit
def load_rows(
    target_ptr, weight_ptr, inverse_count_ptr, rows, row_ok, V, weight_stride, ignore_index
):
    """(target, counted, fault, weight) of each row; ``rows`` may be a scalar.

    The target is an int32 column, -1 where it is none; the fault is NaN where it should be one.
    """
    target = tl.load(target_ptr + rows, mask=row_ok, other=0).to(tl.int64)
    counted = row_ok & (target != ignore_index)
    known = (target >= 0) & (target < V)
    fault = tl.where(counted & (known == 0), float("nan"), 0.0)
    target = tl.where(known, target, -1).to(tl.int32)
    weight = fault + 1.0
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + rows * weight_stride, mask=row_ok, other=0.0).to(tl.float32)
    if inverse_count_ptr is not None:
        weight *= tl.load(inverse_count_ptr)
    return target, counted, fault, weight


@triton.jit
def row_loss(
    m, log_l, target_score, score_sum, V, label_smoothing, z_loss, SMOOTHING: tl.constexpr
):
    """The loss of rows that count."""
    loss = m - target_score
    if SMOOTHING:
        mean = score_sum / tl.cast(V, tl.float32)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (m - mean)
    lse = m + log_l
    return loss + log_l + z_loss * lse * lse


@triton.jit
def dlogits_tile(
    e, t, m, total, weight, is_target, V, label_smoothing, z_loss,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """fp32 gradient of scores with e = exp(s - m); row values broadcast against e."""
    on_target = 1.0
    p = e * ((1.0 + 2.0 * z_loss * (m + tl.log(total))) / total)
    if SMOOTHING:
        p -= label_smoothing / tl.cast(V, tl.float32)
        on_target = 1.0 - label_smoothing
    ds = weight * tl.where(is_target, p - on_target, p)
    if SOFTCAP:
        ds *= 1.0 - t * t
    return ds


@triton.jit(do_not_specialize=["N", "ignore_index"])
def cross_entropy_rows_kernel(
    logits_ptr,  # [N, V], rows logits_stride elements apart
    target_ptr,  # integers [N]
    loss_ptr,  # fp32 [N] or None
    dlogits_ptr,  # [N, V], rows dlogits_stride apart, or None; may be logits_ptr
    weight_ptr,  # [N], weight_stride apart, or None: 1
    inverse_count_ptr,  # fp32 [1] or None: 1
    N, V, logits_stride, dlogits_stride, weight_stride, ignore_index, label_smoothing, z_loss,
    softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_V)
    row_ok = rows < N
    target, counted, fault, weight = load_rows(
        target_ptr, weight_ptr, inverse_count_ptr, rows, row_ok, V, weight_stride, ignore_index
    )
    col_ok = (cols < V)[None, :]
    ok = counted[:, None] & col_ok
    places = logits_ptr + rows[:, None] * logits_stride + cols[None, :]
    x = tl.load(places, mask=ok, other=0.0).to(tl.float32)
    s, t = capped(x, softcap, SOFTCAP)

    m = tl.max(tl.where(ok, s, float("-inf")), axis=1)
    m = tl.where(counted, m, 0.0)
    e = tl.where(ok, tl.exp(s - m[:, None]), 0.0)
    total = tl.where(counted, tl.sum(e, axis=1), 1.0)
    log_l = tl.log(total)
    is_target = cols[None, :] == target[:, None]
    if loss_ptr is not None:
        target_score = tl.sum(tl.where(is_target & ok, s, 0.0), axis=1)
        score_sum = tl.sum(tl.where(ok, s, 0.0), axis=1)
        loss = row_loss(
            m, log_l, target_score, score_sum, V, label_smoothing, z_loss, SMOOTHING
        ) + fault  # fmt: skip
        tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0), mask=row_ok)
    if dlogits_ptr is not None:
        ds = dlogits_tile(
            e, t, m[:, None], total[:, None], weight[:, None], is_target, V, label_smoothing,
            z_loss, SMOOTHING, SOFTCAP,
        )  # fmt: skip
        ds = tl.where(ok, ds, 0.0).to(dlogits_ptr.dtype.element_ty)
        places = dlogits_ptr + rows[:, None] * dlogits_stride + cols[None, :]
        tl.store(places, ds, mask=row_ok[:, None] & col_ok)


@triton.jit
def edge_tile(edge_start, head, body, length, LANES: tl.constexpr):
    """(columns, which of them exist) of the edge's tile that starts at its ``edge_start``."""
    inside = edge_start + lane_offsets(LANES)
    return tl.where(inside < head, inside, inside + body), inside < length


@triton.jit
def lane_offsets(LANES: tl.constexpr):
    """[LANES, ALIGN]: the columns of a tile from its start."""
    return tl.arange(0, LANES)[:, None] * ALIGN + tl.arange(0, ALIGN)[None, :]


@triton.jit
def accumulate(s, seen, m, total, score_sum, SMOOTHING: tl.constexpr):
    """One tile [LANES, ALIGN] into the running max, sum of exponentials and sum of each lane.

    ``s`` is -inf where ``seen`` is False; None: every column exists.
    """
    new = tl.maximum(m, tl.max(s, axis=1))
    # A lane that has seen only -inf stays at -inf, and must not subtract it from itself.
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), axis=1)
    if SMOOTHING:
        score_sum += tl.sum(s if seen is None else tl.where(seen, s, 0.0), axis=1)
    return new, total, score_sum


@triton.jit(do_not_specialize=["N", "ignore_index"])
def cross_entropy_wide_kernel(
    logits_ptr, target_ptr, loss_ptr, dlogits_ptr, weight_ptr, inverse_count_ptr,
    N, V, logits_stride, dlogits_stride, weight_stride, ignore_index, label_smoothing, z_loss,
    softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, SAME_STRIDE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Arguments as in ``cross_entropy_rows_kernel``, one row per program.

    SAME_STRIDE: the gradient lies like the logits, so that the body is aligned in both.
    """
    TILE: tl.constexpr = LANES * ALIGN
    row = tl.program_id(0).to(tl.int64)
    target, counted, fault, weight = load_rows(
        target_ptr, weight_ptr, inverse_count_ptr, row, row < N, V, weight_stride, ignore_index
    )
    first = row * logits_stride
    # The product by ALIGN is what shows the compiler that the body is aligned.
    aligned = (first + ALIGN - 1) // ALIGN * ALIGN
    head = tl.minimum((aligned - first).to(tl.int32), V)
    tiles = (V - head) // TILE
    body = tiles * TILE
    length = V - body
    out_first = row * dlogits_stride
    out_aligned = aligned if SAME_STRIDE else out_first + head
    offsets = lane_offsets(LANES)

    m = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    score_sum = tl.zeros((LANES,), tl.float32)
    target_score = 0.0
    if counted:
        target_x = tl.load(logits_ptr + first + target, mask=target >= 0, other=0.0).to(tl.float32)
        target_score = capped(target_x, softcap, SOFTCAP)[0]
        for start in range(0, length, TILE):
            cols, ok = edge_tile(start, head, body, length, LANES)
            x = tl.load(logits_ptr + first + cols, mask=ok, other=float("-inf")).to(tl.float32)
            s = capped(x, softcap, SOFTCAP)[0]
            if SOFTCAP:
                s = tl.where(ok, s, float("-inf"))
            m, total, score_sum = accumulate(s, ok, m, total, score_sum, SMOOTHING)
        for tile in range(0, tiles):
            x = tl.load(
                logits_ptr + aligned + tile * TILE + offsets, eviction_policy="evict_last"
            ).to(tl.float32)
            s = capped(x, softcap, SOFTCAP)[0]
            m, total, score_sum = accumulate(s, None, m, total, score_sum, SMOOTHING)

    row_m = tl.max(m, axis=0)
    base = tl.where(row_m == float("-inf"), 0.0, row_m)
    row_total = tl.sum(total * tl.exp(m - base), axis=0)
    row_m = tl.where(counted, row_m, 0.0)
    row_total = tl.where(counted, row_total, 1.0)
    log_l = tl.log(row_total)
    if loss_ptr is not None:
        loss = row_loss(
            row_m, log_l, target_score, tl.sum(score_sum, axis=0), V, label_smoothing, z_loss,
            SMOOTHING,
        ) + fault  # fmt: skip
        tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    if dlogits_ptr is not None:
        # In place, no thread may store while another still reads for the sums.
        tl.debug_barrier()
        seen_tiles = tl.where(counted, tiles, 0)
        for back in range(0, seen_tiles):
            start = body - (back + 1) * TILE
            x = tl.load(logits_ptr + aligned + start + offsets, eviction_policy="evict_first").to(
                tl.float32
            )
            s, t = capped(x, softcap, SOFTCAP)
            is_target = head + start + offsets == target
            ds = dlogits_tile(
                tl.exp(s - row_m), t, row_m, row_total, weight, is_target, V, label_smoothing,
                z_loss, SMOOTHING, SOFTCAP,
            )  # fmt: skip
            ds = ds.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + out_aligned + start + offsets, ds)
        for tile in range(seen_tiles, tiles):
            nothing = tl.zeros((LANES, ALIGN), tl.float32).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + out_aligned + tile * TILE + offsets, nothing)
        for start in range(0, length, TILE):
            cols, ok = edge_tile(start, head, body, length, LANES)
            x = tl.load(logits_ptr + first + cols, mask=ok & counted, other=float("-inf"))
            x = x.to(tl.float32)
            s, t = capped(x, softcap, SOFTCAP)
            ds = dlogits_tile(
                tl.exp(s - row_m), t, row_m, row_total, weight, cols == target, V, label_smoothing,
                z_loss, SMOOTHING, SOFTCAP,
            )  # fmt: skip
            ds = tl.where(counted, ds, 0.0).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + out_first + cols, ds, mask=ok)
