// The producer of Hopper's attention backward: one thread copies k, v and the tiles of queries; one
// for each group of consumers adds dq. The story is in attention_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_tiles_sm90.h"
#include "kernels/attention_bwd_wide_tiles_sm90.h"
#include "ptx/bulk.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace attention_bwd {

template <class C>
__device__ __forceinline__ void init_barriers(typename C::Barriers& barriers) {
  constexpr int kWarps = kConsumers / kWarpSize;
  ptx::mbarrier_init(&barriers.k_full, 1);
  ptx::mbarrier_init(&barriers.v_full, 1);
  for (int i = 0; i < C::kQueryStages; ++i) {
    ptx::mbarrier_init(&barriers.q_full[i], 1);
    ptx::mbarrier_init(&barriers.q_empty[i], kWarps);
  }
  for (int i = 0; i < C::kDoutStages; ++i) {
    ptx::mbarrier_init(&barriers.dout_full[i], 1);
    ptx::mbarrier_init(&barriers.dout_empty[i], kWarps);
  }
  if constexpr (C::kBulkAdds) {
    for (int group = 0; group < kGroups; ++group) {
      ptx::mbarrier_init(&barriers.dq_full[group], kWarps / kGroups);
      ptx::mbarrier_init(&barriers.dq_empty[group], 1);
    }
  }
  ptx::fence_mbarrier_init();
}

// What all threads do first.
template <class C>
__device__ __forceinline__ void start_block(typename C::SharedStorage& smem,
                                            const HopperBackwardMaps& maps) {
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(maps.q);
    ptx::tma_prefetch(maps.k);
    ptx::tma_prefetch(maps.v);
    ptx::tma_prefetch(maps.dout);
    init_barriers<C>(smem.barriers);
  }
  __syncthreads();
}

// Brings a whole tile, from row `first` on; the barrier expects its bytes already.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_tile(SlabTile<kRows, kColumns>& sTile,
                                          const ptx::TensorMap& map, uint64_t* full, int first,
                                          int head, int batch, int first_column = 0) {
  using Tile = SlabTile<kRows, kColumns>;
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::tma_load(&sTile.chunks[slab][0][0], map, full,
                  {first_column + slab * Tile::kSlabColumns, first, head, batch});
  }
}

template <int kRows, int kColumns>
__device__ __forceinline__ void load_tile(HalvedTile<kRows, kColumns>& sTile,
                                          const ptx::TensorMap& map, uint64_t* full, int first,
                                          int head, int batch) {
  load_tile(sTile.halves[0], map, full, first, head, batch);
  load_tile(sTile.halves[1], map, full, first, head, batch, kColumns / 2);
}

// Of q and dout comes first what is released first: up to 128 columns dout, above q.
template <class C>
__device__ __forceinline__ void produce(typename C::SharedStorage& smem,
                                        const HopperBackwardParams& hopper,
                                        const QueryWalk<C>& walk, int key_head) {
  constexpr uint32_t kLseBytes = sizeof(smem.lse[0]), kDeltaBytes = sizeof(smem.delta[0]);
  auto& barriers = smem.barriers;
  ptx::mbarrier_arrive_expect_tx(&barriers.k_full, C::Keys::kBytes);
  load_tile(smem.k, hopper.maps.k, &barriers.k_full, walk.s_first, key_head, walk.batch);
  ptx::mbarrier_arrive_expect_tx(&barriers.v_full, C::Keys::kBytes);
  load_tile(smem.v, hopper.maps.v, &barriers.v_full, walk.s_first, key_head, walk.batch);
  walk.for_each([&](unsigned n, int head, int t_first) {
    const float* gNumbers = hopper.room.numbers + walk.index(hopper, walk.batch, head, t_first) *
                                                      (C::kLseFloats + C::kBlockT);
    const auto load_dout = [&] {
      const unsigned stage = n % C::kDoutStages;
      ptx::mbarrier_wait(&barriers.dout_empty[stage], n / C::kDoutStages % 2 ^ 1u);
      uint64_t* full = &barriers.dout_full[stage];
      ptx::mbarrier_arrive_expect_tx(full, C::Queries::kBytes + kDeltaBytes);
      load_tile(smem.dout[stage], hopper.maps.dout, full, t_first, head, walk.batch);
      ptx::bulk_load(smem.delta[stage], gNumbers + C::kLseFloats, kDeltaBytes, full);
    };
    if constexpr (!C::kQueriesFirst) load_dout();
    const unsigned stage = n % C::kQueryStages;
    ptx::mbarrier_wait(&barriers.q_empty[stage], n / C::kQueryStages % 2 ^ 1u);
    uint64_t* full = &barriers.q_full[stage];
    ptx::mbarrier_arrive_expect_tx(full, C::Queries::kBytes + kLseBytes);
    load_tile(smem.q[stage], hopper.maps.q, full, t_first, head, walk.batch);
    ptx::bulk_load(smem.lse[stage], gNumbers, kLseBytes, full);
    if constexpr (C::kQueriesFirst) load_dout();
  });
}

// Where a group's part of a tile of dq is added to.
template <class C>
__device__ __forceinline__ float* dq_sums(const typename C::Params& told, const QueryWalk<C>& walk,
                                          int head, int t_first, int group) {
  const int64_t tile = walk.index(told, walk.sums_batch, head, t_first);
  return told.room.dq_sums + tile * C::kTileFloats + group * C::kGroupStride;
}

// One thread adds what its group has written.
template <class C>
__device__ __forceinline__ void add_gradients(typename C::SharedStorage& smem,
                                              const typename C::Params& told,
                                              const QueryWalk<C>& walk, int group) {
  auto& barriers = smem.barriers;
  walk.for_each([&](unsigned n, int head, int t_first) {
    ptx::mbarrier_wait(&barriers.dq_full[group], n % 2);
    ptx::bulk_add(dq_sums<C>(told, walk, head, t_first, group), smem.dq.group[group],
                  sizeof(smem.dq.group[group]));
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&barriers.dq_empty[group]);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
