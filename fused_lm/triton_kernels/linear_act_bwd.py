"""Backward of a linear with an activation: dAct and the bias gradient ride on another kernel's way.

    dgrad_act:  dpre = (dy W2) * act'(pre)      in the epilogue of the GEMM that makes dhidden;
                dgate = dhidden * value * act'(gate), dvalue = dhidden * act(gate) if gated
    act_bwd:    dpre = dy * act'(pre)           where dy comes from outside
    wgrad:      dW = dpre^T x                   fp32 over all rows, added to a gradient on request

Bias gradients are column sums of dpre in two stages, without atomics: ``dgrad_act`` leaves one fp32
row per row tile, ``act_bwd`` one per strip of row tiles, ``column_sums`` adds them in order.
A hidden that was not kept is made again from pre in the epilogue of ``dgrad_act``: one store more,
no product more. ``wgrad`` splits its sum over rows where the output has fewer tiles than the GPU
has SMs; the parts are added in order too.

Bytes that the fused epilogue saves, for b-byte elements: M N * 2b for dhidden written and read,
M N * b for the pass that would sum dpre.

Sources: as ``linear_act_fwd``.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.activations import activation_tile, derivative_tile
from fused_lm.triton_kernels.linear_act_fwd import operand, output, product, tile_index


@triton.jit
def store_sums(partial_ptr, strip, cols, col_ok, value, ok, width):
    """Column sums of an fp32 tile, into row ``strip`` of the partials."""
    total = tl.sum(tl.where(ok, value, 0.0), axis=0)
    tl.store(partial_ptr + strip.to(tl.int64) * width + cols, total, mask=col_ok)


@triton.jit(do_not_specialize=["M"])
def dgrad_act_kernel(
    dy_ptr,  # [M, K], elements dy_row and dy_k apart
    weight_ptr,  # [K, N] of the layer above, elements w_k and w_n apart
    pre_ptr,  # [M, N] (gated: [M, 2N]) contiguous
    dpre_ptr,  # as pre
    hidden_ptr,  # [M, N] contiguous to make act(pre) again, or None
    partial_ptr,  # fp32 [row tiles, N] (gated: [row tiles, 2N]) or None
    M, N, K, dy_row, dy_k, w_k, w_n,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    RUN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP)
    dy, dy_rows, row_ok = operand(dy_ptr, row_tile, dy_row, M, BLOCK_M)
    weight, w_cols, col_ok = operand(weight_ptr, col_tile, w_n, N, BLOCK_N)
    dhidden = product(
        dy, dy_rows, row_ok, dy_k, weight, w_cols, col_ok, w_k, K,
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, EVEN_K, RUN_K, BLOCK_K,
    )  # fmt: skip

    width = N
    if GATED:
        width = 2 * N
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = row_ok[:, None] & col_ok[None, :]
    pre_at = output(pre_ptr, row_tile, col_tile, width, BLOCK_M, BLOCK_N)
    dpre_at = output(dpre_ptr, row_tile, col_tile, width, BLOCK_M, BLOCK_N)
    pre = tl.load(pre_at, mask=ok, other=0.0).to(tl.float32)
    hidden = activation_tile(pre, ACTIVATION)
    dpre = dhidden * derivative_tile(pre, ACTIVATION)
    if GATED:
        dvalue = dhidden * hidden
        tl.store(dpre_at + N, dvalue.to(dpre_ptr.dtype.element_ty), mask=ok)
        if partial_ptr is not None:
            store_sums(partial_ptr, row_tile, cols + N, col_ok, dvalue, ok, width)
        value = tl.load(pre_at + N, mask=ok, other=0.0).to(tl.float32)
        dpre *= value
        hidden *= value
    tl.store(dpre_at, dpre.to(dpre_ptr.dtype.element_ty), mask=ok)
    if partial_ptr is not None:
        store_sums(partial_ptr, row_tile, cols, col_ok, dpre, ok, width)
    if hidden_ptr is not None:
        out = output(hidden_ptr, row_tile, col_tile, N, BLOCK_M, BLOCK_N)
        tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M"])
def act_bwd_kernel(
    dy_ptr,  # [M, N], elements dy_row and dy_col apart
    pre_ptr,  # [M, N] (gated: [M, 2N]) contiguous, or None: no activation
    dpre_ptr,  # as pre, or None: only the sums
    partial_ptr,  # fp32 [strips, N] (gated: [strips, 2N]) or None
    M, N, dy_row, dy_col,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, strips): a program walks the row tiles strip, strip + strips, ..."""
    strip = tl.program_id(1)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < N
    width = N
    if GATED:
        width = 2 * N
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    value_sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for tile in range(strip, tl.cdiv(M, ROWS), tl.num_programs(1)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        ok = (rows < M)[:, None] & col_ok[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row + cols[None, :] * dy_col, mask=ok, other=0.0)
        dpre = dy.to(tl.float32)
        at = rows[:, None] * width + cols[None, :]
        if pre_ptr is not None:
            pre = tl.load(pre_ptr + at, mask=ok, other=0.0).to(tl.float32)
            if GATED:
                value = tl.load(pre_ptr + at + N, mask=ok, other=0.0).to(tl.float32)
                dvalue = dpre * activation_tile(pre, ACTIVATION)
                tl.store(dpre_ptr + at + N, dvalue.to(dpre_ptr.dtype.element_ty), mask=ok)
                value_sums += tl.where(ok, dvalue, 0.0)
                dpre *= value
            dpre *= derivative_tile(pre, ACTIVATION)
        sums += tl.where(ok, dpre, 0.0)
        if dpre_ptr is not None:
            tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=ok)
    if partial_ptr is not None:
        partial = partial_ptr + strip.to(tl.int64) * width + cols
        tl.store(partial, tl.sum(sums, axis=0), mask=col_ok)
        if GATED:
            tl.store(partial + N, tl.sum(value_sums, axis=0), mask=col_ok)


@triton.jit(do_not_specialize=["K", "per_split"])
def wgrad_kernel(
    a_ptr,  # [K, M], elements a_k and a_m apart: read as its transpose
    b_ptr,  # [K, N], elements b_k and b_n apart
    out_ptr,  # [splits, M, N] contiguous; [M, N] with out_row and out_col where there is one split
    M, N, K, per_split, a_k, a_m, b_k, b_n, out_row, out_col,
    ADD: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, RUN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A^T B over the ``per_split`` rows of this split; ADD keeps what ``out`` holds."""
    row_tile, col_tile = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1).to(tl.int64)
    first = split * per_split
    a, a_rows, row_ok = operand(a_ptr + first * a_k, row_tile, a_m, M, BLOCK_M)
    b, b_cols, col_ok = operand(b_ptr + first * b_k, col_tile, b_n, N, BLOCK_N)
    count = tl.minimum(K - first, per_split).to(tl.int32)
    acc = product(
        a, a_rows, row_ok, a_k, b, b_cols, col_ok, b_k, count,
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, EVEN_K, RUN_K, BLOCK_K,
    )  # fmt: skip

    ok = row_ok[:, None] & col_ok[None, :]
    out, out_rows, _ok = operand(out_ptr + split * M * N, row_tile, out_row, M, BLOCK_M)
    out, out_cols, _ok = operand(out, col_tile, out_col, N, BLOCK_N)
    out_at = out + (out_rows[:, None] + out_cols[None, :])
    if ADD:
        acc += tl.load(out_at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=ok)
