"""Tile shapes of the norm kernels: pure functions of width and bytes, a reason per row.

The cost model: a norm moves bytes and computes next to nothing, so each SM needs about 26 KB of
loads in flight (4.3 TB/s x 0.8 us over 132 SMs) from programs that are all resident, and no spills.
The backward holds about six fp32 values per element (xhat, dy, weight, two sums, the gradient): 16
elements per thread fit the 128 registers that 16 warps per SM leave each thread.

None of these rows has been measured on a GPU: they come from the model and from the compiler's
register and shared memory counts.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_BLOCK_C = 8
"""Columns: one Philox call serves eight."""
TILE_ELEMENTS = 2048
TILE_BYTES = 8192
"""Limits of programs that hold several rows, over all tensors they read."""
PREFETCH_BYTES = 80 * 1024
"""Shared memory per SM for prefetched tiles: sm_86, sm_89 and sm_120 have 99 KB, sums need some."""
MAX_STAGES = 3
RESIDENT_WARPS = 16
"""Warps per SM of the persistent grid, at most."""
REGISTERS_PER_SM, MAX_REGISTERS = 65536, 255
"""Of 32 bits; the second is a thread's limit. They are given out by eights."""


@dataclass(frozen=True)
class Tuning:
    """One kernel's tile [rows, block_c] and launch.

    Attributes:
        looped: The tile does not hold whole rows.
        stages: Of the row loop: stages - 1 tiles are prefetched (backward).
        programs_per_sm: Size of the persistent grid (backward); 0: one program per tile.
        max_registers: Per thread, so that all of the persistent grid is resident; None: no limit.
    """

    rows: int
    block_c: int
    num_warps: int
    looped: bool
    reason: str
    stages: int = 1
    programs_per_sm: int = 0
    max_registers: int | None = None


@dataclass(frozen=True)
class _Row:
    max_c: int
    num_warps: int
    reason: str


_FORWARD = (
    _Row(2048, 4, "small programs: some load while others are busy with their sums"),
    _Row(4096, 8, "one row, 16 elements per thread"),
    _Row(8192, 16, "one row, 16 elements per thread"),
    _Row(16384, 16, "one row, 32 elements per thread: 1024 threads would leave 64 registers each"),
)
_FORWARD_WIDE = Tuning(
    rows=1,
    block_c=8192,
    num_warps=16,
    looped=True,
    reason="few large programs, so that the rows in flight stay in the L2 for the later passes",
)

_BACKWARD = (
    _Row(2048, 4, "up to four programs per SM, 16 elements per thread"),
    _Row(4096, 8, "one row, 16 elements per thread, one or two programs per SM"),
    _Row(8192, 16, "one row, 16 elements per thread; the two sums of a wider row would spill"),
)
_BACKWARD_WIDE_BLOCK_C = 1024
_BACKWARD_WIDE = _Row(0, 4, "blocks of columns, after a pass for the row means: fits at any width")

_ROW_MEANS = Tuning(
    rows=1, block_c=4096, num_warps=8, looped=True, reason="one pass, 16 elements per thread"
)


def forward_tuning(C: int, read_bytes: int) -> Tuning:
    """Tile of ``norm_fwd_kernel``, or of ``norm_fwd_wide_kernel`` where ``looped``.

    Args:
        C: Width of a row.
        read_bytes: Bytes that are read per element: x and residual.
    """
    row = _find(_FORWARD, C)
    if row is None:
        return _FORWARD_WIDE
    block_c = max(MIN_BLOCK_C, next_power_of_2(C))
    return Tuning(_rows(block_c, read_bytes), block_c, row.num_warps, False, row.reason)


def backward_tuning(C: int, read_bytes: int) -> Tuning:
    """Tile of ``norm_bwd_kernel``; where ``looped``, the row means come from their own kernel.

    Args:
        C: Width of a row.
        read_bytes: Bytes that are read per element: stream, dy and dstream.
    """
    found = _find(_BACKWARD, C)
    row = found or _BACKWARD_WIDE
    block_c = max(MIN_BLOCK_C, next_power_of_2(C)) if found else _BACKWARD_WIDE_BLOCK_C
    rows = _rows(block_c, read_bytes)
    tile_bytes = rows * block_c * read_bytes
    programs_per_sm = max(1, min(RESIDENT_WARPS // row.num_warps, PREFETCH_BYTES // tile_bytes))
    tiles = PREFETCH_BYTES // (programs_per_sm * tile_bytes)
    registers = REGISTERS_PER_SM // (programs_per_sm * row.num_warps * 32)
    return Tuning(
        rows=rows,
        block_c=block_c,
        num_warps=row.num_warps,
        looped=found is None,
        reason=row.reason,
        stages=min(MAX_STAGES, 1 + tiles),
        programs_per_sm=programs_per_sm,
        max_registers=min(MAX_REGISTERS, registers // 8 * 8),
    )


def row_means_tuning() -> Tuning:
    """Tile of ``norm_bwd_row_means_kernel``."""
    return _ROW_MEANS


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def _rows(block_c: int, read_bytes: int) -> int:
    """A power of two, 1 where a row fills the tile."""
    elements = min(TILE_ELEMENTS, TILE_BYTES // read_bytes)
    return max(1, next_power_of_2(elements + 1) // 2 // block_c)


def _find(table: tuple[_Row, ...], C: int) -> _Row | None:
    return next((row for row in table if row.max_c >= C), None)
