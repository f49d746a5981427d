"""LayerNorm and RMSNorm backward, with the residual stream's gradient and dropout in the same pass.

    xhat      = (stream - mean) * rstd                      RMSNorm: mean = 0
    g         = dy * weight
    dresidual = dstream + rstd * (g - mean(g) - xhat * mean(g * xhat))      RMSNorm: without mean(g)
    dx        = keep * dresidual
    dweight   = sum over rows of dy * xhat;   dbias = sum over rows of dy

Grid, ``norm_bwd_kernel``: (column blocks, strips). A program walks the row tiles strip, strip +
strips, ...; cp.async brings the next STAGES - 1 tiles while this one is reduced. It keeps dweight
and dbias as [ROWS, BLOCK_C] fp32 sums in registers, added up over rows once at the end, and writes
one row of the [strips, C] partials. Strips are a few per SM, so partials stay in the L2.
Rows up to the register limit are one column block and the row means are taken in place. For wider
rows ``norm_bwd_row_means_kernel`` (one program per row) writes them first.

``norm_bwd_finalize_kernel``: one program per column block adds the strips of both parameters in a
fixed order and casts. No atomics: results repeat bitwise on the same GPU.

Bytes per element of b bytes: 3b (stream, dy, dx), 4b with dstream, where a norm's backward and an
add move 6b; one b more for a separate dresidual, two for wide rows. Partials: 16 * strips * C.

Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.column_sums import sum_strips
from fused_lm.triton_kernels.layernorm_fwd import (
    keep_factor,
    load_columns,
    load_tile,
    row_mean,
)


@triton.jit
def load_xhat(
    stream_ptr, mean_ptr, rstd_ptr, rows, stride, cols, row_ok, ok, CENTRED: tl.constexpr
):
    """xhat fp32 [ROWS, BLOCK_C] and rstd [ROWS, 1]. Masked columns hold -mean * rstd, not 0."""
    value = load_tile(stream_ptr, rows, stride, cols, ok)
    rstd = tl.load(rstd_ptr + rows, mask=row_ok, other=0.0)[:, None]
    if CENTRED:
        value -= tl.load(mean_ptr + rows, mask=row_ok, other=0.0)[:, None]
    return value * rstd, rstd


@triton.jit(do_not_specialize=["N", "threshold"])
def norm_bwd_kernel(
    dy_ptr,  # [N, C], rows dy_stride elements apart
    dstream_ptr,  # [N, C], rows dstream_stride apart, or None
    stream_ptr,  # [N, C], rows stream_stride apart
    weight_ptr,  # [C] or None
    mean_ptr,  # fp32 [N], None unless CENTRED
    rstd_ptr,  # fp32 [N]
    row_means_ptr,  # fp32 [2, N]: mean(g * xhat), mean(g); None where a column block is a whole row
    rng_ptr,  # int64 [4] or None: no dropout
    dx_ptr,  # [N, C] contiguous
    dresidual_ptr,  # [N, C] contiguous, or None
    dweight_ptr,  # fp32 [strips, C] or None
    dbias_ptr,  # fp32 [strips, C] or None
    N, C, dy_stride, dstream_stride, stream_stride, threshold, keep_scale,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col_start = tl.program_id(0) * BLOCK_C
    strip = tl.program_id(1)
    cols = col_start + tl.arange(0, BLOCK_C)
    col_ok = cols < C
    weight = None if weight_ptr is None else load_columns(weight_ptr, cols, col_ok)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)

    for tile in tl.range(strip, tl.cdiv(N, ROWS), tl.num_programs(1), num_stages=STAGES):
        row_start = tl.cast(tile, tl.int64) * ROWS
        rows = row_start + tl.arange(0, ROWS)
        row_ok = rows < N
        ok = row_ok[:, None] & col_ok[None, :]
        dy = load_tile(dy_ptr, rows, dy_stride, cols, ok)
        xhat, rstd = load_xhat(
            stream_ptr, mean_ptr, rstd_ptr, rows, stream_stride, cols, row_ok, ok, CENTRED
        )

        # Masked elements have dy = 0 and so add nothing to any of the four sums.
        g = dy if weight_ptr is None else dy * weight
        if row_means_ptr is None:
            grad = g - xhat * row_mean(g * xhat, C)
            if CENTRED:
                grad -= row_mean(g, C)
        else:
            grad = g - xhat * tl.load(row_means_ptr + rows, mask=row_ok, other=0.0)[:, None]
            if CENTRED:
                grad -= tl.load(row_means_ptr + N + rows, mask=row_ok, other=0.0)[:, None]
        grad *= rstd
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy

        offsets = rows[:, None] * C + cols[None, :]
        if dstream_ptr is not None:
            grad += load_tile(dstream_ptr, rows, dstream_stride, cols, ok)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, grad.to(dresidual_ptr.dtype.element_ty), mask=ok)
        if rng_ptr is not None:
            grad *= keep_factor(rng_ptr, row_start, col_start, threshold, keep_scale, ROWS, BLOCK_C)
        tl.store(dx_ptr + offsets, grad.to(dx_ptr.dtype.element_ty), mask=ok)

    partial = strip.to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=col_ok)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=col_ok)


@triton.jit(do_not_specialize=["N"])
def norm_bwd_row_means_kernel(
    dy_ptr, stream_ptr, weight_ptr, mean_ptr, rstd_ptr, row_means_ptr, N, C, dy_stride,
    stream_stride, CENTRED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row means of one row per program; arguments as in ``norm_bwd_kernel``."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_ok = rows < N
    sum_gx = tl.zeros((1, BLOCK_C), tl.float32)
    sum_g = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        col_ok = cols < C
        ok = col_ok[None, :]
        g = load_tile(dy_ptr, rows, dy_stride, cols, ok)
        xhat, _ = load_xhat(
            stream_ptr, mean_ptr, rstd_ptr, rows, stream_stride, cols, row_ok, ok, CENTRED
        )
        if weight_ptr is not None:
            g *= load_columns(weight_ptr, cols, col_ok)
        sum_gx += g * xhat
        sum_g += g
    tl.store(row_means_ptr + rows[:, None], row_mean(sum_gx, C))
    if CENTRED:
        tl.store(row_means_ptr + N + rows[:, None], row_mean(sum_g, C))


@triton.jit(do_not_specialize=["strips"])
def norm_bwd_finalize_kernel(
    dweight_partial_ptr,  # fp32 [strips, C] or None
    dbias_partial_ptr,  # fp32 [strips, C] or None
    dweight_ptr,  # [C] or None
    dbias_ptr,  # [C] or None
    strips, C, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = cols < C
    if dweight_ptr is not None:
        dweight = sum_strips(dweight_partial_ptr, strips, cols, C, col_ok, STRIPS, BLOCK_C)
        tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=col_ok)
    if dbias_ptr is not None:
        dbias = sum_strips(dbias_partial_ptr, strips, cols, C, col_ok, STRIPS, BLOCK_C)
        tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=col_ok)
