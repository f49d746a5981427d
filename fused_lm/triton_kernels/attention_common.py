"""What every attention kernel shares: how a program finds its tile, and how q.k becomes a score.

    score = softcap(scale * q.k) + bias,   softcap(x) = c * tanh(x / c)
    row t sees key s  iff  t + lower <= s <= t + upper,  mask[b, h, t, s]  and  key_mask[b, s]

Index tiles are passed as ``rows`` and ``cols`` that broadcast against each other, so the same
helpers serve [T, S] tiles (rows [:, None], cols [None, :]) and the transposed [S, T] tiles of dK
and dV.

Exponentials are powers of two. Without softcap and bias a tile of scores stays the raw q.k, and
``unit`` = scale goes with log2(e) into the one FMA before exp2; otherwise the tile holds the scores
themselves and ``unit`` = 1.

Offsets inside a tile and from tile to tile are int64: a row stride times a row number can pass
2**31.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_lm.triton_kernels.philox import keep_tile
from fused_lm.triton_kernels.tanh import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


class Strides(NamedTuple):
    """Element strides of a 4-D tensor; 0 where a dim of size 1 is broadcast.

    aligned: whether every row starts at a multiple of 16 bytes. Triton sees it by itself only where
    strides are multiples of 16 elements; heads of 40 would be loaded element by element.
    """

    batch: int
    head: int
    row: int
    col: int
    aligned: tl.constexpr


class Masks(NamedTuple):
    """The tensors that hide keys or move scores, with their strides; None where there is none.

    mask: bool [B, H, T, S], key_mask: bool [B, S], bias: float [B, H, T, S]; stride 0 broadcasts.
    Flat, because Triton 3.6 loses constants in a tuple of tuples.
    """

    mask: Any
    mask_batch: int | None
    mask_head: int | None
    mask_row: int | None
    mask_col: int | None
    key_mask: Any
    key_mask_batch: int | None
    key_mask_col: int | None
    bias: Any
    bias_batch: int | None
    bias_head: int | None
    bias_row: int | None
    bias_col: int | None


class Dropout(NamedTuple):
    """rng: int64 [4]; threshold: lanes below it are dropped; scale: factor of the kept."""

    rng: Any
    threshold: int
    scale: float


@triton.jit
def program_tile(n_tiles, n_heads, REVERSED: tl.constexpr):
    """(tile, head, batch) of this program in a 1-D grid: 2**31 programs where y and z end at 65535.

    REVERSED hands out the last tiles first: under a causal mask they are the longest.
    """
    pid = tl.program_id(0)
    tile = pid % n_tiles
    pid = pid // n_tiles
    if REVERSED:
        tile = n_tiles - 1 - tile
    return tile, (pid % n_heads).to(tl.int64), (pid // n_heads).to(tl.int64)


@triton.jit
def band_tiles(first, last, length, lower, upper, BLOCK: tl.constexpr):
    """Which tiles of the other axis positions first..last see: (begin, full_begin, full_end, end).

    [begin, end) holds every visible position of 0..length, [full_begin, full_end) only whole tiles
    that all of first..last see completely. All but ``end`` are multiples of BLOCK.
    """
    begin, end = 0, length
    full_begin, full_end = 0, length // BLOCK * BLOCK
    if lower is not None:
        begin = tl.maximum(first + lower, 0) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last + lower, 0), BLOCK) * BLOCK
    if upper is not None:
        end = tl.minimum(tl.maximum(last + upper + 1, 0), length)
        full_end = tl.minimum(tl.maximum(first + upper + 1, 0) // BLOCK * BLOCK, full_end)
    full_begin = tl.minimum(full_begin, tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin))
    return begin, full_begin, tl.maximum(full_begin, full_end), end


@triton.jit
def whole_tiles(masks, begin, full_begin, full_end):
    """(full_begin, full_end), or nothing if a mask may hide any key of any tile."""
    if masks.mask is not None or masks.key_mask is not None:
        full_begin, full_end = begin, begin
    return full_begin, full_end


@triton.jit
def load_rows(
    base, start, strides, length, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """[BLOCK, D_PADDED]: rows start.. of a matrix with contiguous rows of D; zeros outside of it.

    CHECK: whether rows at or after ``length`` may be among them.
    """
    rows = start + tl.arange(0, BLOCK)
    cols = tl.arange(0, D_PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * strides.row + cols[None, :]
    if strides.aligned:
        pointers = tl.multiple_of(pointers, [1, 16])
    if CHECK and D != D_PADDED:
        tile = tl.load(pointers, mask=(rows < length)[:, None] & (cols < D)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=(rows < length)[:, None], other=0.0)
    elif D != D_PADDED:
        tile = tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    base, tile, start, strides, length, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """The inverse of :func:`load_rows`, rounding to the dtype of the matrix."""
    rows = start + tl.arange(0, BLOCK)
    cols = tl.arange(0, D_PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * strides.row + cols[None, :]
    if strides.aligned:
        pointers = tl.multiple_of(pointers, [1, 16])
    inside = (rows < length)[:, None] & (cols < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def visible_tile(masks, batch, head, rows, cols, T, S, lower, upper):
    """bool tile: row t may attend to key s. False outside of the T x S matrix."""
    visible = (rows < T) & (cols < S)
    if lower is not None:
        visible &= cols >= rows + lower
    if upper is not None:
        visible &= cols <= rows + upper
    if masks.key_mask is not None:
        key_mask = masks.key_mask + batch * masks.key_mask_batch
        key_mask = key_mask + cols.to(tl.int64) * masks.key_mask_col
        visible &= tl.load(key_mask, mask=cols < S, other=0)
    if masks.mask is not None:
        mask = masks.mask + batch * masks.mask_batch + head * masks.mask_head
        mask = mask + rows.to(tl.int64) * masks.mask_row + cols.to(tl.int64) * masks.mask_col
        visible &= tl.load(mask, mask=visible, other=0)
    return visible


@triton.jit
def score_tile(qk, masks, batch, head, rows, cols, T, S, scale, softcap, SOFTCAP: tl.constexpr):
    """q.k -> (scores / unit, tanh(x / softcap)); the second is q.k itself without softcap."""
    tanh_tile = qk
    if SOFTCAP:
        tanh_tile = tanh(qk * (scale / softcap))
        score = tanh_tile * softcap
    elif masks.bias is not None:
        score = qk * scale
    else:
        score = qk
    if masks.bias is not None:
        bias = masks.bias + batch * masks.bias_batch + head * masks.bias_head
        bias = bias + rows.to(tl.int64) * masks.bias_row + cols.to(tl.int64) * masks.bias_col
        score += tl.load(bias, mask=(rows < T) & (cols < S), other=0.0).to(tl.float32)
    return score, tanh_tile


@triton.jit
def score_unit(masks, scale, SOFTCAP: tl.constexpr):
    """What turns a tile of :func:`score_tile` into natural-log scores."""
    unit = scale
    if SOFTCAP or masks.bias is not None:
        unit = 1.0
    return unit


@triton.jit
def load_lse(lse, masks, rows, T, PRECISION: tl.constexpr):
    """lse of ``rows`` as P needs it: +inf for rows outside or without a key, whose P is 0."""
    value = tl.load(lse + rows, mask=rows < T, other=float("-inf"))
    if PRECISION != "ieee" and masks.bias is None:
        value *= LOG2_E
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def probability_tile(
    qk, lse, masks, batch, head, rows, cols, T, S, lower, upper, scale, softcap,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P = exp(score - lse) and the tanh tile; lse broadcasts like ``rows``.

    For exact fp32, and under a bias, which may be -1e9, the difference is taken before the change
    of base: rounded factors would be multiplied by the size of the scores.
    """
    score, tanh_tile = score_tile(qk, masks, batch, head, rows, cols, T, S, scale, softcap, SOFTCAP)
    unit = score_unit(masks, scale, SOFTCAP)
    if PRECISION == "ieee" or masks.bias is not None:
        p = tl.exp2((score * unit - lse) * LOG2_E)
    else:
        p = tl.exp2(score * (unit * LOG2_E) - lse)
    if MASKED:
        p = tl.where(visible_tile(masks, batch, head, rows, cols, T, S, lower, upper), p, 0.0)
    return p, tanh_tile


@triton.jit
def dropout_factor(
    dropout, batch, head, t_start, s_start, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """What dropout multiplies P by: [BLOCK_T, BLOCK_S] of 0 or its scale; 1 without dropout."""
    factor = 1.0
    if dropout is not None:
        keep = keep_tile(
            dropout.rng, batch, head, t_start, s_start, dropout.threshold, BLOCK_T, BLOCK_S
        )
        factor = tl.where(keep, dropout.scale, 0.0)
    return factor
