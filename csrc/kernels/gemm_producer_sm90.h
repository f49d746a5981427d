// The producer of Hopper's matrix product: one thread, which copies both operands. The story is in
// gemm_sm90.h.
#pragma once

#include "kernels/gemm_tiles_sm90.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace gemm {

// 64 of K of an operand's rows, in one box; of a turned one in a box per slab.
template <bool kTurned, class Tile>
__device__ __forceinline__ void load_operand(Tile& sTile, const ptx::TensorMap& map, uint64_t* full,
                                             int row, int k) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    uint4* sSlab = &sTile.chunks[slab][0][0];
    if constexpr (kTurned) {
      ptx::tma_load(sSlab, map, full, {row + slab * Tile::kSlabColumns, k});
    } else {
      ptx::tma_load(sSlab, map, full, {k, row});
    }
  }
}

template <class C>
__device__ __forceinline__ void produce(typename C::SharedStorage& smem, const Arguments& args) {
  Ring<C::kStages> ring;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tile_count(args); tile += gridDim.x) {
    const TileAt at = tile_at<C>(args, tile);
#pragma unroll 1
    for (int k = 0; k < args.K; k += kGemmBlockK) {
      auto& stage = smem.stages[ring.stage];
      uint64_t* full = &smem.barriers.full[ring.stage];
      ptx::mbarrier_wait(&smem.barriers.empty[ring.stage], ring.parity ^ 1u);
      ptx::mbarrier_arrive_expect_tx(full, C::A::kBytes + C::B::kBytes);
      load_operand<C::kTurnedA>(stage.a, args.a, full, at.row, k);
      load_operand<C::kTurnedB>(stage.b, args.b, full, at.column, k);
      ring.next();
    }
  }
}

}  // namespace gemm
}  // namespace fused_lm
