"""Second stage of deterministic sums over rows: partials [strips, C] to one row, in fixed order.

The first stage leaves one fp32 row per strip of rows; no atomics, so results repeat bitwise on the
same GPU. Strips are few (some per SM, or one per row tile), and their partials still in the L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
_ROWS = (16, 256)


@triton.jit
def sum_strips(partial_ptr, strips, cols, C, col_ok, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """fp32 [BLOCK_C]: column sums of fp32 [strips, C], STRIPS rows at a time."""
    total = tl.zeros((STRIPS, BLOCK_C), tl.float32)
    for start in range(0, strips, STRIPS):
        rows = (start + tl.arange(0, STRIPS)).to(tl.int64)
        ok = (rows < strips)[:, None] & col_ok[None, :]
        total += tl.load(partial_ptr + rows[:, None] * C + cols[None, :], mask=ok, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["strips"])
def column_sums_kernel(
    partial_ptr,  # fp32 [strips, C]
    out_ptr,  # [C]
    strips, C, ADD: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_C columns; ADD keeps what ``out`` holds."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = cols < C
    value = sum_strips(partial_ptr, strips, cols, C, col_ok, STRIPS, BLOCK_C)
    if ADD:
        value += tl.load(out_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols, value.to(out_ptr.dtype.element_ty), mask=col_ok)


@dataclass(frozen=True)
class Tuning:
    """Tile [rows, block_c] of the kernel; ``looped``: strips are more than its rows."""

    rows: int
    block_c: int
    num_warps: int
    reason: str
    looped: bool


def column_sums_tuning(strips: int) -> Tuning:
    """As many strips at once as there are, while each is read by whole sectors."""
    fewest, most = _ROWS
    rows = min(most, max(fewest, triton.next_power_of_2(strips)))
    reason = "16 elements per thread; at least 16 columns, two 32-byte sectors of every strip"
    return Tuning(rows, _ELEMENTS // rows, 8, reason, rows < strips)


def column_sums(partial: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Sums fp32 [strips, C] into ``out``, contiguous, of C elements; on the current device."""
    strips, C = partial.shape
    tuning = column_sums_tuning(strips)
    column_sums_kernel[(triton.cdiv(C, tuning.block_c),)](
        partial, out, strips, C, add, tuning.rows, tuning.block_c,
        num_warps=tuning.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def sums_to(partial: Tensor | None, parameter: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of a parameter from its partials; empty for an absent one."""
    if parameter is None or partial is None:
        return like.new_empty(0)
    return column_sums(partial, torch.empty_like(parameter, memory_format=torch.contiguous_format))
