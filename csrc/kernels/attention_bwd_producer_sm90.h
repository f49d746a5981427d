// The producer of Hopper's attention backward: one thread copies k, v and the tiles of queries; one
// for each group of consumers adds dq. The story is in attention_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_tiles_sm90.h"
#include "ptx/bulk.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace attention_bwd {

// Brings a whole tile, from row `first` on; the barrier expects its bytes already.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile& sTile, const ptx::TensorMap& map, uint64_t* full,
                                          int first, int head, int batch) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::tma_load(&sTile.chunks[slab][0][0], map, full,
                  {slab * Tile::kSlabColumns, first, head, batch});
  }
}

// dout comes first: its place is free earlier than that of q, by a product.
template <class C>
__device__ __forceinline__ void produce(typename C::SharedStorage& smem,
                                        const HopperBackwardParams& hopper,
                                        const QueryWalk<C>& walk, int key_head) {
  constexpr uint32_t kLseBytes = sizeof(smem.lse[0]), kDeltaBytes = sizeof(smem.delta[0]);
  auto& barriers = smem.barriers;
  ptx::mbarrier_arrive_expect_tx(&barriers.k_full, C::Keys::kBytes);
  load_tile(smem.k, hopper.k, &barriers.k_full, walk.s_first, key_head, walk.batch);
  ptx::mbarrier_arrive_expect_tx(&barriers.v_full, C::Keys::kBytes);
  load_tile(smem.v, hopper.v, &barriers.v_full, walk.s_first, key_head, walk.batch);
  walk.for_each([&](unsigned n, int head, int t_first) {
    const unsigned stage = n % kStages, free = n / kStages % 2 ^ 1u;
    const float* gNumbers = hopper.room.numbers + walk.index(hopper.p.shape, head, t_first) *
                                                      (C::kLseFloats + C::kBlockT);
    ptx::mbarrier_wait(&barriers.dout_empty[stage], free);
    uint64_t* full = &barriers.dout_full[stage];
    ptx::mbarrier_arrive_expect_tx(full, C::Queries::kBytes + kDeltaBytes);
    load_tile(smem.dout[stage], hopper.dout, full, t_first, head, walk.batch);
    ptx::bulk_load(smem.delta[stage], gNumbers + C::kLseFloats, kDeltaBytes, full);
    ptx::mbarrier_wait(&barriers.q_empty[stage], free);
    full = &barriers.q_full[stage];
    ptx::mbarrier_arrive_expect_tx(full, C::Queries::kBytes + kLseBytes);
    load_tile(smem.q[stage], hopper.q, full, t_first, head, walk.batch);
    ptx::bulk_load(smem.lse[stage], gNumbers, kLseBytes, full);
  });
}

// Where a group's part of a tile of dq is added to.
template <class C>
__device__ __forceinline__ float* dq_sums(const HopperBackwardParams& hopper,
                                          const QueryWalk<C>& walk, int head, int t_first,
                                          int group) {
  const int64_t tile = walk.index(hopper.p.shape, head, t_first);
  return hopper.room.dq_sums + tile * C::kTileFloats + group * C::kGroupStride;
}

// One thread adds what its group has written.
template <class C>
__device__ __forceinline__ void add_gradients(typename C::SharedStorage& smem,
                                              const HopperBackwardParams& hopper,
                                              const QueryWalk<C>& walk, int group) {
  auto& barriers = smem.barriers;
  walk.for_each([&](unsigned n, int head, int t_first) {
    ptx::mbarrier_wait(&barriers.dq_full[group], n % 2);
    ptx::bulk_add(dq_sums<C>(hopper, walk, head, t_first, group), smem.dq.group[group],
                  sizeof(smem.dq.group[group]));
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&barriers.dq_empty[group]);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
