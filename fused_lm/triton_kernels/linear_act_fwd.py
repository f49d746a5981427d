"""GEMM with bias and activation in the epilogue, and the tile product that its relatives share.

    pre = x W^T + b       rounded to the dtype of the outputs, stored if the backward will read it
    y   = act(pre)        gated: act(gate) * value, both from one pass over x

Grid: one program per tile [BLOCK_M, BLOCK_N] of the output, numbered so that programs that run at
the same time share rows and columns in the L2 (GROUP row tiles at a time, columns in between).
A program walks K in BLOCK_K steps; cp.async brings the next stages while tensor cores multiply.
Operands are read through their strides, so W may lie [out, in] or [in, out]. A tile's corner is a
64-bit address, offsets inside it are 32 bits: half the registers, and the host copies an operand
whose strides would not fit. Sums of fp32 operands have two levels, see :func:`product`.

FLOPs 2 M N K (gated: twice that); bytes of HBM about (M K + K N + M N) * b, and M N * b more for
pre, where an activation of its own would move 2 M N * b.

Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202).
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.activations import activation_tile


@triton.jit
def tile_index(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // per_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + pid % per_group % rows, pid % per_group // rows


@triton.jit
def operand(ptr, tile, stride, limit, BLOCK: tl.constexpr):
    """(corner, offsets [BLOCK], inside [BLOCK]) of rows or columns ``tile * BLOCK ...``."""
    local = tl.arange(0, BLOCK)
    return ptr + tile.to(tl.int64) * BLOCK * stride, local * stride, tile * BLOCK + local < limit


@triton.jit
def product(
    a_ptr, a_rows, a_ok, a_k, b_ptr, b_cols, b_ok, b_k, K, acc, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, RUN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + A B, fp32 [BLOCK_M, BLOCK_N]: operands from :func:`operand`, and their steps in K.

    Every RUN_K terms are a sum of their own, added to the whole; RUN_K = 0: one sum of all terms.
    """
    if RUN_K == 0:
        acc = product_run(
            a_ptr, a_rows, a_ok, a_k, b_ptr, b_cols, b_ok, b_k, K, acc, PRECISION, EVEN_K, BLOCK_K
        )
    else:
        for start in range(0, K, RUN_K):
            acc += product_run(
                a_ptr, a_rows, a_ok, a_k, b_ptr, b_cols, b_ok, b_k, tl.minimum(K - start, RUN_K),
                tl.zeros_like(acc), PRECISION, EVEN_K, BLOCK_K,
            )  # fmt: skip
            a_ptr += RUN_K * tl.cast(a_k, tl.int64)
            b_ptr += RUN_K * tl.cast(b_k, tl.int64)
    return acc


@triton.jit
def product_pair(
    a_ptr, a_rows, a_ok, a_k, b_ptr, c_ptr, b_cols, b_ok, b_k, K, acc_b, acc_c,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, RUN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(acc_b + A B, acc_c + A C): :func:`product` with two right sides, A loaded once."""
    if RUN_K == 0:
        acc_b, acc_c = product_pair_run(
            a_ptr, a_rows, a_ok, a_k, b_ptr, c_ptr, b_cols, b_ok, b_k, K, acc_b, acc_c, PRECISION,
            EVEN_K, BLOCK_K,
        )  # fmt: skip
    else:
        for start in range(0, K, RUN_K):
            zero = tl.zeros_like(acc_b)
            part_b, part_c = product_pair_run(
                a_ptr, a_rows, a_ok, a_k, b_ptr, c_ptr, b_cols, b_ok, b_k,
                tl.minimum(K - start, RUN_K), zero, zero, PRECISION, EVEN_K, BLOCK_K,
            )  # fmt: skip
            acc_b += part_b
            acc_c += part_c
            a_ptr += RUN_K * tl.cast(a_k, tl.int64)
            b_ptr += RUN_K * tl.cast(b_k, tl.int64)
            c_ptr += RUN_K * tl.cast(b_k, tl.int64)
    return acc_b, acc_c


@triton.jit
def product_run(
    a_ptr, a_rows, a_ok, a_k, b_ptr, b_cols, b_ok, b_k, K, acc, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + A B, one term after the other."""
    ks = tl.arange(0, BLOCK_K)
    a = a_ptr + (a_rows[:, None] + ks[None, :] * a_k)
    b = b_ptr + (ks[:, None] * b_k + b_cols[None, :])
    for start in range(0, K, BLOCK_K):
        a_tile = load_operand(a, a_ok[:, None], ks[None, :] < K - start, EVEN_K)
        b_tile = load_operand(b, b_ok[None, :], ks[:, None] < K - start, EVEN_K)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a += BLOCK_K * a_k
        b += BLOCK_K * b_k
    return acc


@triton.jit
def product_pair_run(
    a_ptr, a_rows, a_ok, a_k, b_ptr, c_ptr, b_cols, b_ok, b_k, K, acc_b, acc_c,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(acc_b + A B, acc_c + A C), one term after the other."""
    ks = tl.arange(0, BLOCK_K)
    a = a_ptr + (a_rows[:, None] + ks[None, :] * a_k)
    b = b_ptr + (ks[:, None] * b_k + b_cols[None, :])
    c = c_ptr + (ks[:, None] * b_k + b_cols[None, :])
    for start in range(0, K, BLOCK_K):
        a_tile = load_operand(a, a_ok[:, None], ks[None, :] < K - start, EVEN_K)
        b_tile = load_operand(b, b_ok[None, :], ks[:, None] < K - start, EVEN_K)
        c_tile = load_operand(c, b_ok[None, :], ks[:, None] < K - start, EVEN_K)
        acc_b = tl.dot(a_tile, b_tile, acc_b, input_precision=PRECISION)
        acc_c = tl.dot(a_tile, c_tile, acc_c, input_precision=PRECISION)
        a += BLOCK_K * a_k
        b += BLOCK_K * b_k
        c += BLOCK_K * b_k
    return acc_b, acc_c


@triton.jit
def load_operand(ptr, ok, k_ok, EVEN_K: tl.constexpr):
    """A tile with zeros outside; where K fills whole tiles its mask is left out."""
    if not EVEN_K:
        ok = ok & k_ok
    return tl.load(ptr, mask=ok, other=0.0)


@triton.jit
def output(ptr, row_tile, col_tile, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_N] into a contiguous matrix of ``width`` columns."""
    corner = ptr + row_tile.to(tl.int64) * BLOCK_M * width + col_tile * BLOCK_N
    return corner + (tl.arange(0, BLOCK_M)[:, None] * width + tl.arange(0, BLOCK_N)[None, :])


@triton.jit
def rounded(acc, bias_ptr, cols, ok, like_ptr):
    """acc + bias as the pre-activation keeps it."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=ok, other=0.0).to(tl.float32)[None, :]
    return acc.to(like_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def linear_act_fwd_kernel(
    x_ptr,  # [M, K], elements x_row and x_k apart
    weight_ptr,  # [N, K] (gated: [2N, K], gates first), elements w_out and w_in apart
    bias_ptr,  # [N] (gated: [2N]) or None
    y_ptr,  # [M, N] contiguous
    pre_ptr,  # [M, N] (gated: [M, 2N]) contiguous, or None
    M, N, K, x_row, x_k, w_out, w_in,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    RUN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP)
    x, x_rows, row_ok = operand(x_ptr, row_tile, x_row, M, BLOCK_M)
    weight, w_cols, col_ok = operand(weight_ptr, col_tile, w_out, N, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = row_ok[:, None] & col_ok[None, :]
    if GATED:
        values = weight + tl.cast(N, tl.int64) * w_out  # N = 1 is a constant
        acc, acc_value = product_pair(
            x, x_rows, row_ok, x_k, weight, values, w_cols, col_ok, w_in, K, acc, acc, PRECISION,
            EVEN_K, RUN_K, BLOCK_K,
        )  # fmt: skip
        gate = rounded(acc, bias_ptr, cols, col_ok, y_ptr)
        value = rounded(acc_value, bias_ptr, cols + N, col_ok, y_ptr)
        if pre_ptr is not None:
            pre = output(pre_ptr, row_tile, col_tile, 2 * N, BLOCK_M, BLOCK_N)
            tl.store(pre, gate, mask=ok)
            tl.store(pre + N, value, mask=ok)
        y = activation_tile(gate.to(tl.float32), ACTIVATION) * value.to(tl.float32)
    else:
        acc = product(
            x, x_rows, row_ok, x_k, weight, w_cols, col_ok, w_in, K, acc, PRECISION, EVEN_K, RUN_K,
            BLOCK_K,
        )  # fmt: skip
        pre = rounded(acc, bias_ptr, cols, col_ok, y_ptr)
        if pre_ptr is not None:
            tl.store(output(pre_ptr, row_tile, col_tile, N, BLOCK_M, BLOCK_N), pre, mask=ok)
        y = activation_tile(pre.to(tl.float32), ACTIVATION)
    out = output(y_ptr, row_tile, col_tile, N, BLOCK_M, BLOCK_N)
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=ok)
