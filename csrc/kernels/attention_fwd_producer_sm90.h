// The producer of the Hopper forward: one thread takes tiles of queries and copies q and k, one
// copies v. The story is in attention_fwd_sm90.h.
#pragma once

#include "kernels/attention_fwd_tiles_sm90.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace attention_fwd {

// Brings a whole tile, from row `first` on; `full` counts its bytes.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile& sTile, const ptx::TensorMap& map, uint64_t* full,
                                          int first, int head, int batch) {
  ptx::mbarrier_arrive_expect_tx(full, Tile::kBytes);
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::tma_load(&sTile.chunks[slab][0][0], map, full,
                  {slab * Tile::kSlabColumns, first, head, batch});
  }
}

// Brings tile i of a walk over k or v once its place is free. n: as for the consumers.
template <class C>
__device__ __forceinline__ void load_keys(typename C::Keys (&sTiles)[C::kStages],
                                          const ptx::TensorMap& map, uint64_t* full,
                                          uint64_t* empty, const Work& work, int group, int i,
                                          unsigned n) {
  const Stage<C::kStages> at(n + i);
  ptx::mbarrier_wait(&empty[at.index], at.parity ^ 1u);
  load_tile(sTiles[at.index], map, &full[at.index], work.walk.start<C::kBlockS>(i),
            work.tile.head / group, work.tile.batch);
}

// One thread takes tiles of queries, tells everybody, and brings q and k. The counter is asked a
// tile ahead. A tile's first k comes before its q, which may have to wait for its place.
template <class C>
__device__ __forceinline__ void produce_keys(typename C::SharedStorage& smem,
                                             const AttentionForwardParams& p,
                                             const ptx::TensorMap& q_map,
                                             const ptx::TensorMap& k_map, const TileOrder& order,
                                             int* counter) {
  auto& barriers = smem.barriers;
  unsigned n = 0;
  int index = static_cast<int>(blockIdx.x);
  unsigned round = 0;
  for (; index < order.count(); ++round) {
    Work& work = smem.work[round % kWorkSlots];
    work.tile = order.at(index, p.shape.H);
    work.walk = key_walk<C>(p, work.tile.tile);
    // Without a counter every block has one tile.
    index =
        counter == nullptr ? order.count() : static_cast<int>(gridDim.x) + atomicAdd(counter, 1);
    const Stage<C::kQueries> place(round);
    const auto load = [&](int i) {
      load_keys<C>(smem.k, k_map, barriers.k_full, barriers.k_empty, work, p.shape.group, i, n);
    };
    if (work.walk.count > 0) load(0);
    ptx::mbarrier_wait(&barriers.q_empty[place.index], place.parity ^ 1u);
    if (work.walk.count > 0) {
      load_tile(smem.q[place.index], q_map, &barriers.q_full[place.index],
                work.tile.tile * C::kBlockT, work.tile.head, work.tile.batch);
    } else {
      ptx::mbarrier_arrive(&barriers.q_full[place.index]);
    }
#pragma unroll 1
    for (int i = 1; i < work.walk.count; ++i) load(i);
    n += work.walk.count;
  }
  const Stage<C::kQueries> place(round);
  ptx::mbarrier_wait(&barriers.q_empty[place.index], place.parity ^ 1u);
  smem.work[round % kWorkSlots].tile.tile = kNoTile;
  ptx::mbarrier_arrive(&barriers.q_full[place.index]);
}

// One thread of another warp brings v, so that neither waits for the other's places.
template <class C>
__device__ __forceinline__ void produce_values(typename C::SharedStorage& smem,
                                               const ptx::TensorMap& v_map, int group) {
  auto& barriers = smem.barriers;
  unsigned n = 0;
  for (unsigned round = 0;; ++round) {
    const Stage<C::kQueries> place(round);
    ptx::mbarrier_wait(&barriers.q_full[place.index], place.parity);
    const Work& work = smem.work[round % kWorkSlots];
    if (work.tile.tile == kNoTile) return;
#pragma unroll 1
    for (int i = 0; i < work.walk.count; ++i) {
      load_keys<C>(smem.v, v_map, barriers.v_full, barriers.v_empty, work, group, i, n);
    }
    n += work.walk.count;
    ptx::mbarrier_arrive(&barriers.q_empty[place.index]);
  }
}

}  // namespace attention_fwd
}  // namespace fused_lm
