// The producer of the packed forward: one warp finds tiles of queries and copies q and k, one
// copies v. The story is in attention_varlen_fwd_sm90.h.
#pragma once

#include "kernels/attention_fwd_producer_sm90.h"
#include "kernels/attention_varlen_tiles_sm90.h"

namespace fused_lm {
namespace attention_varlen {

// What is to be done with tile `tile` of a sequence, for one lane.
template <class C>
__device__ __forceinline__ void describe(VarlenWork& sWork, const AttentionVarlenParams& p,
                                         const PackedRows& q, const PackedRows& k, int tile,
                                         int head) {
  sWork.tile = {tile, 0, 0};
  sWork.head = head;
  sWork.q = q;
  sWork.k = k;
  AttentionForwardParams one{};
  one.shape.T = q.length;
  one.shape.S = k.length;
  sWork.lower = one.score.lower = bound_of_sequence(p.lower, q, k, p.aligned_at_end);
  sWork.upper = one.score.upper = bound_of_sequence(p.upper, q, k, p.aligned_at_end);
  sWork.walk = key_walk<C>(one, tile);
}

// The next tile that has a query, or kNoTile. A warp calls; its first lane holds the number of the
// next tile, of which it asks the counter while this one is looked for, and writes the Work.
template <class C>
__device__ __forceinline__ bool next_work(VarlenWork& sWork, const AttentionVarlenParams& p,
                                          const TileOrder& order, int* counter, int& next) {
  const bool leads = ptx::lane_index() == 0;
#pragma unroll 1
  while (true) {
    const int index = __shfl_sync(kAllLanes, next, 0);
    if (index >= order.count()) break;
    // Without a counter every block has one tile.
    if (leads) {
      next =
          counter == nullptr ? order.count() : static_cast<int>(gridDim.x) + atomicAdd(counter, 1);
    }
    const BlockTile block = order.at(index, p.H);
    const int sequence = sequence_of<C::kBlockT>(p.bounds_q, p.sequences, block.tile);
    const PackedRows q = rows_of(p.bounds_q, sequence);
    const int tile = block.tile - (q.begin / C::kBlockT + sequence);
    if (tile < 0 || tile >= (q.length + C::kBlockT - 1) / C::kBlockT) continue;
    if (leads) describe<C>(sWork, p, q, rows_of(p.bounds_k, sequence), tile, block.head);
    return true;
  }
  if (leads) {
    sWork.tile.tile = kNoTile;
    sWork.walk.count = 0;
  }
  return false;
}

// Brings q and k of a Work, in the order of the dense forward; n: tiles of keys before it.
template <class C>
__device__ __forceinline__ void bring(typename C::SharedStorage& smem, const VarlenWork& work,
                                      const ptx::TensorMap& q_map, const ptx::TensorMap& k_map,
                                      int group, unsigned round, unsigned n) {
  auto& barriers = smem.barriers;
  const Stage<C::kQueries> place(round);
  const int count = work.walk.count;
  const auto load = [&](int i) {
    const Stage<C::kStages> at(n + i);
    ptx::mbarrier_wait(&barriers.k_empty[at.index], at.parity ^ 1u);
    load_tile(smem.k[at.index], k_map, &barriers.k_full[at.index],
              work.k.begin + work.walk.start<C::kBlockS>(i), work.head / group, 0);
  };
  if (count > 0) load(0);
  ptx::mbarrier_wait(&barriers.q_empty[place.index], place.parity ^ 1u);
  if (count > 0) {
    load_tile(smem.q[place.index], q_map, &barriers.q_full[place.index],
              work.q.begin + work.tile.tile * C::kBlockT, work.head, 0);
  } else {
    ptx::mbarrier_arrive(&barriers.q_full[place.index]);
  }
#pragma unroll 1
  for (int i = 1; i < count; ++i) load(i);
}

// A warp finds tiles, its first lane brings q and k. A tile is looked for when all keys of the one
// before it are on their way.
template <class C>
__device__ __forceinline__ void produce_keys(typename C::SharedStorage& smem,
                                             const AttentionVarlenParams& p,
                                             const ptx::TensorMap& q_map,
                                             const ptx::TensorMap& k_map, const TileOrder& order,
                                             int* counter) {
  const bool leads = ptx::lane_index() == 0;
  int next = static_cast<int>(blockIdx.x);
  unsigned n = 0;
#pragma unroll 1
  for (unsigned round = 0;; ++round) {
    VarlenWork& work = smem.work[round % kWorkSlots];
    const bool found = next_work<C>(work, p, order, counter, next);
    if (leads) {
      bring<C>(smem, work, q_map, k_map, p.group, round, n);
      n += work.walk.count;
    }
    if (!found) return;
  }
}

// Zeros in the rows of v from `row` on.
template <class Tile>
__device__ __forceinline__ void cut_off(Tile& sTile, int row) {
  const uint4 zero{0, 0, 0, 0};
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    uint4* chunks = &sTile.chunks[slab][0][0];
#pragma unroll 1
    for (int i = row * Tile::kSlabChunks + ptx::lane_index(); i < Tile::kRows * Tile::kSlabChunks;
         i += kWarpSize) {
      chunks[i] = zero;
    }
  }
}

// A warp brings v. A box ends where the tile does, and brings what lies behind the sequence: p is 0
// there, but 0 NaN is not. So the tile in which a sequence ends comes to a barrier of this warp,
// which cuts it off before consumers hear of it.
template <class C>
__device__ __forceinline__ void produce_values(typename C::SharedStorage& smem,
                                               const ptx::TensorMap& v_map, int group) {
  auto& barriers = smem.barriers;
  const bool leads = ptx::lane_index() == 0;
  unsigned n = 0, cuts = 0;
#pragma unroll 1
  for (unsigned round = 0;; ++round) {
    const Stage<C::kQueries> place(round);
    ptx::mbarrier_wait(&barriers.q_full[place.index], place.parity);
    const VarlenWork& work = smem.work[round % kWorkSlots];
    if (work.tile.tile == kNoTile) return;
#pragma unroll 1
    for (int i = 0; i < work.walk.count; ++i, ++n) {
      const Stage<C::kStages> at(n);
      const int first = work.walk.start<C::kBlockS>(i);
      const bool ends = first + C::kBlockS > work.k.length;
      uint64_t* full = &barriers.v_full[at.index];
      if (leads) {
        ptx::mbarrier_wait(&barriers.v_empty[at.index], at.parity ^ 1u);
        load_tile(smem.v[at.index], v_map, ends ? &smem.v_raw : full, work.k.begin + first,
                  work.head / group, 0);
      }
      if (!ends) continue;
      ptx::mbarrier_wait(&smem.v_raw, cuts++ % 2);
      cut_off(smem.v[at.index], work.k.length - first);
      ptx::fence_proxy_async();
      __syncwarp();
      if (leads) ptx::mbarrier_arrive(full);
    }
    __syncwarp();  // all have read the Work
    if (leads) ptx::mbarrier_arrive(&barriers.q_empty[place.index]);
  }
}

}  // namespace attention_varlen
}  // namespace fused_lm
