"""Tile shapes of the cross-entropy kernels: pure functions of the vocabulary.

The cost model: loss and gradient move 4 bytes per 16-bit logit, if the second sweep over a row
finds it in the L2. A program per row and P programs per SM keep 132 * P rows in flight: at
V = 50257 that is 13 MB per P of the H200's 50 MB, at V = 131072 it is 35 MB. So wide rows take
large programs: two per SM (512 threads of 64 registers), one where rows are long (1024 threads of
more than 32 registers). One tile is 32 bytes of loads per thread.

None of these rows has been measured on a GPU: they come from the model and from the compiler's
register counts.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIGN = 8
"""Columns of a lane, see ``cross_entropy_kernels.ALIGN``."""
TILE_ELEMENTS = 2048
"""Of programs that hold several rows."""
WIDEST_TILE = 16384
LONG_ROW = 65536
REDUCE_ROWS, REDUCE_WARPS = 4096, 16


@dataclass(frozen=True)
class Tuning:
    """One kernel's launch.

    Attributes:
        rows, block_v: The tile of ``cross_entropy_rows_kernel``; rows 0: the wide kernel.
        lanes: The tile of ``cross_entropy_wide_kernel`` is [lanes, ALIGN].
    """

    rows: int
    block_v: int
    lanes: int
    num_warps: int
    reason: str


def tuning(V: int, itemsize: int) -> Tuning:
    """The kernel and tile for rows of V logits of ``itemsize`` bytes."""
    if V > LONG_ROW:
        lanes, reason = 4096, "one program per SM, or the rows in flight would outgrow the L2"
        return Tuning(0, 0, lanes // itemsize, 32, reason)
    if V > WIDEST_TILE:
        lanes, reason = 2048, "two programs per SM: one loads while the other adds up"
        return Tuning(0, 0, lanes // itemsize, 16, reason)
    block_v = max(ALIGN, 1 << (V - 1).bit_length())
    rows = max(1, TILE_ELEMENTS // block_v)
    num_warps = max(4, block_v // 1024)
    return Tuning(rows, block_v, 0, num_warps, "whole rows, at most 32 elements per thread")


def scale_tuning() -> Tuning:
    """Of ``scale_kernel``."""
    return Tuning(0, 0, 1024, 8, "a plain pass: 32 elements per thread in flight")
