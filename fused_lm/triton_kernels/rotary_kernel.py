"""Rotary positions: every pair (a, b) of a row becomes (a cos - b sin, b cos + a sin).

Grid: one program per BLOCK_T rows of one batch, row tiles fastest. A program loads its rows of the
tables once, [BLOCK_T, 1, R/2], and walks the heads in tiles [BLOCK_T, BLOCK_H, R/2], first those of
x, then those of k: queries and keys are one launch, whatever their head counts. The backward is
the same kernel with INVERSE.

Pairs (i, i + R/2) are two tiles of half rows. Pairs (2i, 2i + 1) are one tile of whole rows, cut
apart in registers: loads of every second element would not be vectorised. Dims from R on are
copied.

Bytes: 2*B*T*(H + Hkv)*D elements, and 8*B*T*R/2 of fp32 tables, from L2 where batches share them.
Offsets are int64. Inputs are read through their strides, all four of them.
"""

import triton
import triton.language as tl


@triton.jit
def table_tile(table, rows, ok, HALF: tl.constexpr, HALF_PADDED: tl.constexpr):
    """fp32 [BLOCK_T, 1, HALF_PADDED]: rows of a contiguous table [S, HALF]; 0 where not ``ok``."""
    cols = tl.arange(0, HALF_PADDED)
    inside = ok[:, None] & (cols < HALF)[None, :]
    tile = tl.load(table + rows[:, None] * HALF + cols[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32)[:, None, :]


@triton.jit
def turn_halves(source, col_stride, target, ok, cos, sin, HALF, HALF_PADDED: tl.constexpr):
    """Pairs (i, i + HALF) of the rows at ``source`` and ``target`` [BLOCK_T, BLOCK_H, 1]."""
    cols = tl.arange(0, HALF_PADDED)[None, None, :]
    inside = ok & (cols < HALF)
    a = tl.load(source + cols * col_stride, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + (cols + HALF) * col_stride, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = target.dtype.element_ty
    tl.store(target + cols, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(target + (cols + HALF), (b * cos + a * sin).to(dtype), mask=inside)


@triton.jit
def turn_neighbours(
    source, col_stride, target, ok, cos, sin, HALF, HALF_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Pairs (2i, 2i + 1) of the rows at ``source`` and ``target`` [BLOCK_T, BLOCK_H, 1]."""
    cols = tl.arange(0, 2 * HALF_PADDED)[None, None, :]
    inside = ok & (cols < 2 * HALF)
    whole = tl.load(source + cols * col_stride, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(whole, [BLOCK_T, BLOCK_H, HALF_PADDED, 2]))
    turned = tl.join(a * cos - b * sin, b * cos + a * sin)
    whole = tl.reshape(turned, [BLOCK_T, BLOCK_H, 2 * HALF_PADDED])
    tl.store(target + cols, whole.to(target.dtype.element_ty), mask=inside)


@triton.jit
def turn_heads(
    x, x_strides, y, y_strides, n_heads, cos, sin, rows, row_ok,
    D: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All heads of ``rows`` of one batch, from x to y [n_heads, T, D]."""
    for first in tl.range(0, n_heads, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        ok = row_ok[:, None, None] & (heads < n_heads)
        source = x + rows[:, None, None] * x_strides[2] + heads * x_strides[1]
        target = y + rows[:, None, None] * y_strides[2] + heads * y_strides[1]
        if INTERLEAVED:
            turn_neighbours(
                source, x_strides[3], target, ok, cos, sin, HALF, HALF_PADDED, BLOCK_T, BLOCK_H
            )
        else:
            turn_halves(source, x_strides[3], target, ok, cos, sin, HALF, HALF_PADDED)
        if D > 2 * HALF:
            cols = 2 * HALF + tl.arange(0, REST_PADDED)[None, None, :]
            inside = ok & (cols < D)
            rest = tl.load(source + cols * x_strides[3], mask=inside, other=0.0)
            tl.store(target + cols, rest, mask=inside)


@triton.jit(do_not_specialize=["T", "S", "n_tiles"])
def rotary_kernel(
    x, x_strides, y, y_strides, H,  # [B, H, T, D]; rows of y are contiguous
    k, k_strides, k_turned, k_turned_strides, Hkv,  # [B, Hkv, T, D] each, or None
    cos, sin,  # [S, HALF], contiguous
    positions, positions_strides,  # int64 [B, T] with stride 0 where it broadcasts, or None
    T, S, n_tiles,
    D: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HKV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch = (pid // n_tiles).to(tl.int64)
    rows = (pid % n_tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_ok = rows < T

    places, known = rows, row_ok
    if positions is not None:
        positions += batch * positions_strides[0]
        places = tl.load(positions + rows * positions_strides[1], mask=row_ok, other=0)
        known = row_ok & (places >= 0) & (places < S)
    cos_tile = table_tile(cos, places, known, HALF, HALF_PADDED)
    sin_tile = table_tile(sin, places, known, HALF, HALF_PADDED)
    if INVERSE:
        sin_tile = -sin_tile

    turn_heads(
        x + batch * x_strides[0], x_strides, y + batch * y_strides[0], y_strides, H,
        cos_tile, sin_tile, rows, row_ok,
        D, HALF, HALF_PADDED, REST_PADDED, INTERLEAVED, BLOCK_T, BLOCK_H,
    )  # fmt: skip
    if k is not None:
        turn_heads(
            k + batch * k_strides[0], k_strides, k_turned + batch * k_turned_strides[0],
            k_turned_strides, Hkv, cos_tile, sin_tile, rows, row_ok,
            D, HALF, HALF_PADDED, REST_PADDED, INTERLEAVED, BLOCK_T, BLOCK_HKV,
        )  # fmt: skip
