"""LayerNorm and RMSNorm forward, with dropout and the residual add in the same pass.

    stream = residual + dropout(x)             fp32, rounded to the stream's dtype, then normalised
    mean   = m + d,  m = mean(stream),  d = mean(stream - m)           RMSNorm: mean = m = d = 0
    rstd   = 1 / sqrt(mean((stream - m)^2) - d^2 + eps)
    y      = (stream - m - d) * rstd * weight + bias

Two passes over registers, never E[x^2] - E[x]^2. d is what rounding left in m: a common offset of
1000 costs y no digits, for one reduction more; it is 0 where the offset is smaller than the values.
Masked columns add 0 to the centred sums.

Grid, ``norm_fwd_kernel``: one program per ROWS whole rows, tile [ROWS, BLOCK_C], BLOCK_C >= C. All
warps lie along the columns first, so a weight is loaded once for ROWS rows.
Grid, ``norm_fwd_wide_kernel``: one program per row, which it walks in BLOCK_C columns three times
(RMSNorm: twice): stream and mean, centred variance, output. Later passes find the row in the L2.

Bytes per element of b bytes: 2b for x and y; with a residual 4b (x, residual, stream, y), where an
add followed by a norm moves 5b. Per row 8 bytes of statistics. Dropout moves nothing.

Sources: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance" (d);
Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.philox import keep_tile


@triton.jit
def load_tile(base, rows, stride, cols, ok):
    """fp32 [ROWS, BLOCK_C] at int64 ``rows`` and ``cols``; 0 where ``ok`` is False."""
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_columns(base, cols, ok):
    """fp32 [1, BLOCK_C] of a weight or bias."""
    return tl.load(base + cols, mask=ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def keep_factor(
    rng_ptr, row_start, col_start, threshold, keep_scale, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """fp32 [ROWS, BLOCK_C]: ``keep_scale`` where dropout keeps, else 0. Batch and head are 0."""
    zero = tl.full([], 0, tl.int32)
    keep = keep_tile(rng_ptr, zero, zero, row_start, col_start, threshold, ROWS, BLOCK_C)
    return tl.where(keep, keep_scale, 0.0)


@triton.jit
def stream_tile(
    x_ptr, residual_ptr, stream_ptr, rng_ptr, row_start, col_start, N, C, x_stride, residual_stride,
    threshold, keep_scale, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, BLOCK_C] of residual + dropout(x), as rounded to the stream, which it stores."""
    rows = row_start + tl.arange(0, ROWS)
    cols = col_start + tl.arange(0, BLOCK_C)
    ok = (rows < N)[:, None] & (cols < C)[None, :]
    value = load_tile(x_ptr, rows, x_stride, cols, ok)
    if residual_ptr is not None:
        residual = load_tile(residual_ptr, rows, residual_stride, cols, ok)
    if rng_ptr is not None:
        value *= keep_factor(rng_ptr, row_start, col_start, threshold, keep_scale, ROWS, BLOCK_C)
    if residual_ptr is not None:
        value += residual
    if stream_ptr is not None:
        rounded = value.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + rows[:, None] * C + cols[None, :], rounded, mask=ok)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def row_mean(value, C):
    """fp32 [ROWS, 1]: mean over the C real columns of [ROWS, BLOCK_C], masked ones being 0."""
    # Rounded division: the fast one would leave a constant row with a difference from its mean.
    return tl.div_rn(tl.sum(value, axis=1, keep_dims=True), tl.cast(C, tl.float32))


@triton.jit
def drift_of(difference, mean, mean_square):
    """What a mean still lacks. Values near a large mean leave exact differences, whose mean
    corrects it; values larger than their mean leave rounded ones, which would spoil it.
    """
    return tl.where(mean * mean > mean_square, difference, 0.0)


@triton.jit
def rstd_of(mean_square, drift, eps):
    """1 / sqrt(mean_square - drift^2 + eps). Of equal values the two terms cancel, and what is left
    may be below 0; a NaN must stay one.
    """
    variance = mean_square - drift * drift
    return tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def store_output(y_ptr, xhat, weight, bias, rows, cols, C, ok):
    """y = xhat * weight + bias, where weight and bias may be None."""
    if weight is not None:
        xhat *= weight
    if bias is not None:
        xhat += bias
    y = xhat.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * C + cols[None, :], y, mask=ok)


@triton.jit(do_not_specialize=["N", "threshold"])
def norm_fwd_kernel(
    x_ptr,  # [N, C], rows x_stride elements apart
    residual_ptr,  # [N, C], rows residual_stride apart, or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    rng_ptr,  # int64 [4] or None: no dropout
    y_ptr,  # [N, C] contiguous
    stream_ptr,  # [N, C] contiguous, or None: the stream is x
    mean_ptr,  # fp32 [N], None unless CENTRED
    rstd_ptr,  # fp32 [N]
    N, C, x_stride, residual_stride, eps, threshold, keep_scale,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    rows = row_start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    row_ok, col_ok = rows < N, cols < C

    value = stream_tile(
        x_ptr, residual_ptr, stream_ptr, rng_ptr, row_start, 0, N, C, x_stride, residual_stride,
        threshold, keep_scale, ROWS, BLOCK_C,
    )  # fmt: skip
    # Loaded before the reductions, whose latency covers these loads.
    weight = None if weight_ptr is None else load_columns(weight_ptr, cols, col_ok)
    bias = None if bias_ptr is None else load_columns(bias_ptr, cols, col_ok)

    drift = 0.0
    if CENTRED:
        mean = row_mean(value, C)
        value = tl.where(col_ok[None, :], value - mean, 0.0)
    mean_square = row_mean(value * value, C)
    if CENTRED:
        drift = drift_of(row_mean(value, C), mean, mean_square)
        tl.store(mean_ptr + rows[:, None], mean + drift, mask=row_ok[:, None])
    rstd = rstd_of(mean_square, drift, eps)
    tl.store(rstd_ptr + rows[:, None], rstd, mask=row_ok[:, None])
    ok = row_ok[:, None] & col_ok[None, :]
    store_output(y_ptr, (value - drift) * rstd, weight, bias, rows, cols, C, ok)


@triton.jit(do_not_specialize=["N", "threshold"])
def norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr, y_ptr, stream_ptr, mean_ptr, rstd_ptr,
    N, C, x_stride, residual_stride, eps, threshold, keep_scale,
    CENTRED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Arguments as in ``norm_fwd_kernel``, one row per program."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    total = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        value = stream_tile(
            x_ptr, residual_ptr, stream_ptr, rng_ptr, row, start, N, C, x_stride, residual_stride,
            threshold, keep_scale, 1, BLOCK_C,
        )  # fmt: skip
        total += value if CENTRED else value * value
    source_ptr, source_stride = x_ptr, x_stride
    if stream_ptr is not None:
        source_ptr, source_stride = stream_ptr, C
        # Later passes may load with another layout what this program's threads have just stored.
        tl.debug_barrier()

    mean, drift = 0.0, 0.0
    if CENTRED:
        mean = row_mean(total, C)
        total = tl.zeros((1, BLOCK_C), tl.float32)
        centred = tl.zeros((1, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            ok = (cols < C)[None, :]
            value = load_tile(source_ptr, rows, source_stride, cols, ok)
            value = tl.where(ok, value - mean, 0.0)
            centred += value
            total += value * value
        drift = drift_of(row_mean(centred, C), mean, row_mean(total, C))
        tl.store(mean_ptr + rows[:, None], mean + drift)
    rstd = rstd_of(row_mean(total, C), drift, eps)
    tl.store(rstd_ptr + rows[:, None], rstd)

    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        col_ok = cols < C
        ok = col_ok[None, :]
        value = load_tile(source_ptr, rows, source_stride, cols, ok)
        weight = None if weight_ptr is None else load_columns(weight_ptr, cols, col_ok)
        bias = None if bias_ptr is None else load_columns(bias_ptr, cols, col_ok)
        xhat = (value - mean - drift) * rstd
        store_output(y_ptr, xhat, weight, bias, rows, cols, C, ok)
