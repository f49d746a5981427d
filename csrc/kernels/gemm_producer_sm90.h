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

// The tiles that the epilogues read, each as soon as the group's results of its tile before are
// out.
template <class C>
__device__ __forceinline__ void produce_sources(typename C::SharedStorage& smem,
                                                const Arguments& args) {
  static_assert(C::kPingPong, "groups have a tile in turn");
  int group = 0;
  uint32_t free = 1;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tile_count(args); tile += gridDim.x) {
    const TileAt at = tile_at<C>(args, tile);
    uint64_t* full = &smem.barriers.source_full[group];
    ptx::mbarrier_wait(&smem.barriers.source_empty[group], free);
    ptx::mbarrier_arrive_expect_tx(full, C::kSlabs * C::Slab::kBytes);
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      ptx::tma_load(&smem.slabs[group][slab].chunks[0][0][0], args.pre, full,
                    {at.column + slab * kSlabColumns, at.row});
    }
    group ^= 1;
    if (group == 0) free ^= 1u;
  }
}

}  // namespace gemm
}  // namespace fused_lm
