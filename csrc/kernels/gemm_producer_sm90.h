// The producer of Hopper's matrix product: one thread, which copies both operands. The story is in
// gemm_sm90.h.
#pragma once

#include "kernels/gemm_tiles_sm90.h"
#include "ptx/cluster.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace gemm {

template <class C>
__device__ __forceinline__ void init_barriers(typename C::Barriers& barriers) {
  for (int stage = 0; stage < C::kStages; ++stage) {
    ptx::mbarrier_init(&barriers.full[stage], 1);
    ptx::mbarrier_init(&barriers.empty[stage], C::kReleases);
  }
  for (int slab = 0; C::kLoads && slab < C::kSlabs; ++slab) {
    for (auto& of_group : barriers.source_full) ptx::mbarrier_init(&of_group[slab], 1);
    ptx::mbarrier_init(&barriers.source_empty[slab], 1);
  }
  ptx::fence_mbarrier_init();
}

// All threads of the block, or of the cluster.
template <class C>
__device__ __forceinline__ void meet() {
  if constexpr (C::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

// What all threads do first.
template <class C>
__device__ __forceinline__ void start_block(typename C::SharedStorage& smem,
                                            const Arguments& args) {
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(args.a);
    ptx::tma_prefetch(args.b);
    init_barriers<C>(smem.barriers);
  }
  meet<C>();
}

// What they do last: nobody leaves a cluster while others may still write to its shared memory.
template <class C>
__device__ __forceinline__ void end_block() {
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    meet<C>();
  }
}

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

// A box of an operand, into the shared memory of all blocks of the cluster.
template <class C>
__device__ __forceinline__ void load_box(uint4* sBox, const ptx::TensorMap& map, uint64_t* full,
                                         const int (&at)[2]) {
  if constexpr (C::kCluster == 1) {
    ptx::tma_load(sBox, map, full, at);
  } else {
    constexpr uint16_t kAll = (1u << C::kCluster) - 1;
    ptx::tma_load_multicast(sBox, map, full, at, kAll);
  }
}

// One share of the right operand: of its rows, or of a turned one's 64 of K.
template <class C>
__device__ __forceinline__ void load_share(typename C::B& sTile, const Arguments& args,
                                           uint64_t* full, int share, int row, int k) {
  constexpr int kShareRows = C::B::kRows / C::kShares;  // in shared memory
  const int first = share * kShareRows;
#pragma unroll
  for (int slab = 0; slab < C::B::kSlabs; ++slab) {
    uint4* sShare = &sTile.chunks[slab][first][0];
    if constexpr (C::kTurnedB) {
      constexpr int kHalf = C::kHalves ? C::B::kSlabs / 2 : C::B::kSlabs;
      const int own = row + slab % kHalf * C::B::kSlabColumns + slab / kHalf * args.next_half;
      load_box<C>(sShare, args.b, full, {own, k + first});
    } else {
      load_box<C>(sShare, args.b, full, {k, row + share * args.next_half});
    }
  }
}

// The right operand. In a cluster each block brings its share to both.
template <class C>
__device__ __forceinline__ void load_right(typename C::B& sTile, const Arguments& args,
                                           uint64_t* full, int row, int k) {
  if constexpr (C::kCluster == 1) {
#pragma unroll
    for (int share = 0; share < C::kShares; ++share) {
      load_share<C>(sTile, args, full, share, row, k);
    }
  } else {
    load_share<C>(sTile, args, full, ptx::cluster_rank(), row, k);
  }
}

// A tile's operands from k on up to `end`.
template <class C>
__device__ __forceinline__ void load_steps(typename C::SharedStorage& smem, const Arguments& args,
                                           Ring<C::kStages>& ring, const TileAt& at, int k,
                                           int end) {
#pragma unroll 1
  for (; k < end; k += kGemmBlockK) {
    auto& stage = smem.stages[ring.stage];
    uint64_t* full = &smem.barriers.full[ring.stage];
    ptx::mbarrier_wait(&smem.barriers.empty[ring.stage], ring.parity ^ 1u);
    ptx::mbarrier_arrive_expect_tx(full, C::A::kBytes + C::B::kBytes);
    load_operand<C::kTurnedA>(stage.a, args.a, full, at.row, k);
    load_right<C>(stage.b, args, full, at.column, k);
    ring.next();
  }
}

template <class C>
__device__ __forceinline__ void produce(typename C::SharedStorage& smem, const Arguments& args) {
  Ring<C::kStages> ring;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < args.whole; tile += gridDim.x) {
    load_steps<C>(smem, args, ring, tile_at(args, tile), 0, args.K);
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
  for (int tile = blockIdx.x; tile < args.whole; tile += gridDim.x) {
    const TileAt at = tile_at(args, tile);
    uint64_t* full = &smem.barriers.source_full[group][0];
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

// The gates and values that gated epilogues read: both groups have the same places for them, one
// per slab of a tile, and take turns. So it is a slab that becomes free, and not a tile.
template <class C>
__device__ __forceinline__ void produce_gated_sources(typename C::SharedStorage& smem,
                                                      const Arguments& args) {
  static_assert(C::kPingPong && kGroups == 2, "groups have a tile in turn; two slabs per place");
  int group = 0;
  uint32_t free = 1;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < args.whole; tile += gridDim.x) {
    const TileAt at = tile_at(args, tile);
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      const int own[] = {at.column + slab * kSlabColumns, at.row};
      uint64_t* full = &smem.barriers.source_full[group][slab];
      ptx::mbarrier_wait(&smem.barriers.source_empty[slab], free);
      ptx::mbarrier_arrive_expect_tx(full, 2 * C::Slab::kBytes);
      ptx::tma_load(&smem.slabs[0][slab].chunks[0][0][0], args.pre, full, own);
      ptx::tma_load(&smem.slabs[1][slab].chunks[0][0][0], args.pre_values, full, own);
    }
    group ^= 1;
    free ^= 1u;
  }
}

}  // namespace gemm
}  // namespace fused_lm
