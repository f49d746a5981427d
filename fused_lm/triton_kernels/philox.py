"""Dropout masks inside Triton kernels: Philox4x32 with 7 rounds, eight 16-bit lanes per call.

The element (batch b, head h, row, column) is dropped or kept by

    counter = (column // 8, row + rng[3], h + rng[2] + (b << 16), rng[1] + (b >> 16))   mod 2**32
    key     = (low, high) 32 bits of rng[0]
    lane    = 16 bits of the four output words: word (column % 8) // 2, low half first
    keep iff lane >= threshold = round(p * 2**16)

so the mask does not depend on tile, thread or kernel, and the backward draws it again. A [T, S]
tile needs T*S/8 Philox calls of 14 wide products each, about 2 integer operations per element and
round. The products are 32 x 32 -> 64 bits: one IMAD.WIDE each, where a separate high half would be
two.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
LANES = tl.constexpr(8)


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1, N_ROUNDS: tl.constexpr):
    """uint32 counters (any shapes that broadcast together) and scalar keys -> four uint32 words."""
    for _ in tl.static_range(N_ROUNDS):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_tile(
    rng, batch, head, row_start, col_start, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """bool [ROWS, COLS]: which elements of the tile at (row_start, col_start) dropout keeps.

    rng: pointer to int64 [4]. batch, head: scalars. col_start and COLS are multiples of 8.
    threshold: int in [0, 2**16], lanes below it are dropped.
    """
    seed = tl.load(rng)
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    rows = (row_start + tl.arange(0, ROWS)).to(tl.int64) + tl.load(rng + 3)
    blocks = col_start // LANES + tl.arange(0, COLS // LANES)
    c0 = tl.broadcast_to(blocks[None, :].to(tl.uint32), (ROWS, COLS // LANES))
    c1 = tl.broadcast_to(rows[:, None].to(tl.uint32), (ROWS, COLS // LANES))
    c2 = (head + tl.load(rng + 2) + (batch << 16)).to(tl.uint32)
    c3 = (tl.load(rng + 1) + (batch >> 16)).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32(
        c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), ROUNDS
    )
    # The dim joined first is the slowest: [ROWS, COLS / 8, word // 2, word % 2, half] row-major.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes.to(tl.int32) >= threshold, (ROWS, COLS))
