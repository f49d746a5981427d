"""Tiles of the linear kernels: a pure function of sizes, bytes and the GPU, a reason per row.

The model: a tensor core needs each loaded element for many products, so tiles are large: a
128 x 128 tile moves 1/64 of a byte from L2 per FLOP. But every SM should have a tile: where the
large ones are fewer than the SMs, smaller ones win. Shared memory holds
``stages * (BLOCK_M + BLOCK_N) * BLOCK_K`` elements, and once a tile on its way into the layout of
the stores. Gated kernels keep two accumulators, so their tiles are half as wide. Exact fp32
products are FMAs out of registers: small tiles, or they spill.

None of these rows has been measured on a GPU: they come from the model and from the compiler's
register and shared memory counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = 8
"""Row tiles that run side by side: 8 x 128 rows of both operands fit the L2 many times."""


@dataclass(frozen=True)
class Tuning:
    """One tile and its launch."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    reason: str

    def tiles(self, M: int, N: int) -> int:
        """Programs for an [M, N] output."""
        return -(-M // self.block_m) * -(-N // self.block_n)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": GROUP,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def shared_bytes(self, element_bytes: int, right_sides: int) -> int:
        """Upper bound of what a program asks for."""
        stage = (self.block_m + right_sides * self.block_n) * self.block_k * element_bytes
        return max(self.num_stages * stage, 4 * self.block_m * self.block_n)


_TILES = {
    "forward": (
        Tuning(
            128,
            128,
            64,
            8,
            4,
            "64 sums a thread: the most with which no epilogue spills where K fills tiles",
        ),
        Tuning(128, 128, 32, 8, 3, "as before, within 99 KB of shared memory"),
    ),
    "gated": (
        Tuning(128, 64, 64, 8, 4, "two accumulators: as many sums a thread as a plain 128 x 128"),
        Tuning(128, 64, 32, 8, 3, "as before, within 99 KB of shared memory"),
    ),
    "dgrad": (
        Tuning(128, 64, 64, 8, 4, "the derivative of 64 sums a thread spills, of 32 it does not"),
        Tuning(128, 64, 32, 8, 3, "as before, within 99 KB of shared memory"),
    ),
}
_WGRAD = (
    Tuning(128, 256, 64, 8, 3, "fewest bytes per product; its epilogue needs no registers"),
    Tuning(128, 128, 64, 8, 4, "where the output has too few of the larger tiles"),
    Tuning(128, 128, 32, 8, 3, "as before, within 99 KB of shared memory"),
)
_SMALL = (
    Tuning(64, 64, 64, 4, 3, "two to eight times the tiles where large ones leave SMs idle"),
    Tuning(64, 64, 32, 4, 3, "as before, within 99 KB of shared memory"),
)
_EXACT = Tuning(32, 64, 16, 4, 2, "exact fp32: FMAs whose operands stay in registers")
_EXACT_GATED = Tuning(32, 64, 16, 8, 2, "twice the sums, each in two levels: 4 warps would spill")

_RUN = 512
"""Terms of fp32 operands that one accumulator sums before it is added to the whole.

Each addition rounds by a fraction of the sum so far. Over n terms that add up evenly this comes to
sqrt(n / 3) roundings of the whole sum in one accumulator; to sqrt((r**2 / n + n / r) / 3) in runs
of r terms: first what n / r runs of r / n of the sum have, then what adding them up has. Least is
r = (n**2 / 2)**(1 / 3): 512 for the 16384 tokens of a weight gradient, 4 roundings instead of 74,
and under 5 from 4096 to 32768 terms. It costs one addition in 512, and that the loads start anew
every 32 steps.
"""

_ROWS_TILE = 2048
_STRIPS_PER_SM = 4
_MAX_SPLITS = 32
_ROWS_PER_SPLIT = 512
"""A split walks at least this many rows: writing and reading its fp32 tile costs as much as 32."""


def gemm_tuning(
    kernel: str, M: int, N: int, element_bytes: int, shared_limit: int, sms: int
) -> Tuning:
    """Tile of a product with [M, N] output.

    Args:
        kernel: ``"forward"``, ``"gated"`` or ``"dgrad"``.
        element_bytes: Of the operands; 4 is exact fp32.
        shared_limit: Bytes of shared memory a program can have.
        sms: Of the GPU.
    """
    if element_bytes > 2:
        return _EXACT_GATED if kernel == "gated" else _EXACT
    sides = 2 if kernel == "gated" else 1
    for tile in _fitting(_TILES[kernel], element_bytes, shared_limit, sides):
        if tile.tiles(M, N) >= sms:
            return tile
    return _fitting(_SMALL, element_bytes, shared_limit, sides)[0]


def wgrad_tuning(
    M: int, N: int, K: int, element_bytes: int, shared_limit: int, sms: int
) -> tuple[Tuning, int]:
    """Tile of ``wgrad_kernel``, and into how many parts its sum over K rows is cut.

    K counts tokens, so there is enough to sum in parts where tiles are fewer than SMs.
    """
    if element_bytes > 2:
        tile = _EXACT
    else:
        fitting = _fitting(_WGRAD, element_bytes, shared_limit, 1)
        enough = (t for t in fitting if t.tiles(M, N) >= sms)
        tile = next(enough, min(fitting, key=lambda t: t.block_n))
    parts = min(sms // tile.tiles(M, N), K // _ROWS_PER_SPLIT, _MAX_SPLITS)
    return tile, max(1, parts)


def run_length(K: int, element_bytes: int) -> int:
    """Terms that are a sum of their own in a sum of K; 0: all. 16-bit operands err far more."""
    return _RUN if element_bytes > 2 and K > _RUN else 0


def _fitting(
    tiles: tuple[Tuning, ...], element_bytes: int, shared_limit: int, right_sides: int
) -> list[Tuning]:
    return [t for t in tiles if t.shared_bytes(element_bytes, right_sides) <= shared_limit]


def act_bwd_tuning(M: int, N: int, sms: int) -> tuple[int, int, int]:
    """(rows, columns, strips) of ``act_bwd_kernel``: 16 elements per thread, some strips per SM."""
    block_n = min(512, max(32, 1 << (N - 1).bit_length()))
    rows = _ROWS_TILE // block_n
    column_blocks = -(-N // block_n)
    strips = max(1, sms * _STRIPS_PER_SM // column_blocks)
    return rows, block_n, min(strips, -(-M // rows))
