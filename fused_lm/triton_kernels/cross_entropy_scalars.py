"""The small kernels around ``cross_entropy_kernels``: counts, sums and one factor.

``inverse_count_kernel`` and ``reduce_loss_kernel`` are one program each, which adds in a fixed
order: 1 / number of rows that count, before the rows' kernel, and the loss of all of them, after
it. Nothing is copied to the host.

``scale_kernel`` multiplies a finished gradient by dloss, in place, one program per row: a dloss of
1, as ``loss.backward()`` sends it, costs a launch and no traffic.
"""

import triton
import triton.language as tl

from fused_lm.triton_kernels.cross_entropy_kernels import ALIGN, edge_tile, lane_offsets


@triton.jit(do_not_specialize=["N", "ignore_index"])
def inverse_count_kernel(target_ptr, inverse_count_ptr, N, ignore_index, BLOCK_N: tl.constexpr):
    """fp32 [1]; 1 where no row counts, so that gradients are 0 and not NaN."""
    counts = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        target = tl.load(target_ptr + rows, mask=rows < N, other=0).to(tl.int64)
        counts += ((target != ignore_index) & (rows < N)).to(tl.int32)
    count = tl.maximum(tl.sum(counts, axis=0), 1)
    tl.store(inverse_count_ptr, 1.0 / count.to(tl.float32))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def reduce_loss_kernel(
    loss_ptr,  # fp32 [N]
    target_ptr,  # integers [N]
    total_ptr,  # fp32 [1]
    N, ignore_index, MEAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the losses, or their mean over the rows that count: NaN if none does."""
    totals = tl.zeros((BLOCK_N,), tl.float32)
    counts = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        totals += tl.load(loss_ptr + rows, mask=rows < N, other=0.0)
        if MEAN:
            target = tl.load(target_ptr + rows, mask=rows < N, other=0).to(tl.int64)
            counts += ((target != ignore_index) & (rows < N)).to(tl.int32)
    total = tl.sum(totals, axis=0)
    if MEAN:
        count = tl.sum(counts, axis=0)
        total = tl.where(count > 0, total / tl.maximum(count, 1).to(tl.float32), float("nan"))
    tl.store(total_ptr, total)


@triton.jit
def scale_kernel(
    dlogits_ptr,  # [N, V] contiguous
    dloss_ptr,  # [N], dloss_stride elements apart
    V, dloss_stride, LANES: tl.constexpr,
):  # fmt: skip
    """Rows are cut into a body and an edge as in ``cross_entropy_wide_kernel``."""
    TILE: tl.constexpr = LANES * ALIGN
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    first = row * V
    aligned = (first + ALIGN - 1) // ALIGN * ALIGN
    head = tl.minimum((aligned - first).to(tl.int32), V)
    tiles = (V - head) // TILE
    offsets = lane_offsets(LANES)
    if factor != 1.0:
        for tile in range(0, tiles):
            place = dlogits_ptr + aligned + tile * TILE + offsets
            value = tl.load(place).to(tl.float32) * factor
            tl.store(place, value.to(dlogits_ptr.dtype.element_ty))
        for start in range(0, V - tiles * TILE, TILE):
            cols, ok = edge_tile(start, head, tiles * TILE, V - tiles * TILE, LANES)
            value = tl.load(dlogits_ptr + first + cols, mask=ok, other=0.0).to(tl.float32) * factor
            tl.store(dlogits_ptr + first + cols, value.to(dlogits_ptr.dtype.element_ty), mask=ok)
