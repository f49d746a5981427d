// The producer of the packed backward: one thread copies, as in the dense one, and a warp cuts off
// what lies behind a sequence. The story is in attention_varlen_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_producer_sm90.h"
#include "kernels/attention_varlen_bwd_tiles_sm90.h"

namespace fused_lm {
namespace attention_bwd {

// Whether a sequence ends in the tile that begins with its row `first`.
__device__ __forceinline__ bool ends_inside(const PackedRows& rows, int first, int tile_rows) {
  return first + tile_rows > rows.length;
}

template <class C>
__device__ __forceinline__ void init_raw_barriers(typename C::SharedStorage& smem) {
  ptx::mbarrier_init(&smem.packed.k_raw, 1);
  ptx::mbarrier_init(&smem.packed.v_raw, 1);
  for (uint64_t& barrier : smem.packed.q_raw) ptx::mbarrier_init(&barrier, 1);
  for (uint64_t& barrier : smem.packed.dout_raw) ptx::mbarrier_init(&barrier, 1);
}

// In the order of the dense backward.
template <class C>
__device__ __forceinline__ void produce_packed(typename C::SharedStorage& smem,
                                               const PackedBackwardParams& told,
                                               const QueryWalk<C>& walk, int key_head) {
  constexpr uint32_t kLseBytes = sizeof(smem.lse[0]), kDeltaBytes = sizeof(smem.delta[0]);
  auto& barriers = smem.barriers;
  const PackedRows &q = smem.packed.sequence.q, &k = smem.packed.sequence.k;
  const auto bring_keys = [&](auto& sTile, const ptx::TensorMap& map, uint64_t* full,
                              uint64_t* raw) {
    uint64_t* to = walk.ragged ? raw : full;
    ptx::mbarrier_arrive_expect_tx(to, C::Keys::kBytes);
    load_tile(sTile, map, to, k.begin + walk.s_first, key_head, 0);
  };
  bring_keys(smem.k, told.maps.k, &barriers.k_full, &smem.packed.k_raw);
  bring_keys(smem.v, told.maps.v, &barriers.v_full, &smem.packed.v_raw);
  walk.for_each([&](unsigned n, int head, int t_first) {
    const float* gNumbers =
        told.room.numbers + walk.index(told, 0, head, t_first) * (C::kLseFloats + C::kBlockT);
    const bool ends = ends_inside(q, t_first, C::kBlockT);
    const auto load_dout = [&] {
      const unsigned stage = n % C::kDoutStages;
      ptx::mbarrier_wait(&barriers.dout_empty[stage], n / C::kDoutStages % 2 ^ 1u);
      uint64_t* to = ends ? &smem.packed.dout_raw[stage] : &barriers.dout_full[stage];
      ptx::mbarrier_arrive_expect_tx(to, C::Queries::kBytes + kDeltaBytes);
      load_tile(smem.dout[stage], told.maps.dout, to, q.begin + t_first, head, 0);
      ptx::bulk_load(smem.delta[stage], gNumbers + C::kLseFloats, kDeltaBytes, to);
    };
    if constexpr (!C::kQueriesFirst) load_dout();
    const unsigned stage = n % C::kQueryStages;
    ptx::mbarrier_wait(&barriers.q_empty[stage], n / C::kQueryStages % 2 ^ 1u);
    uint64_t* to = ends ? &smem.packed.q_raw[stage] : &barriers.q_full[stage];
    ptx::mbarrier_arrive_expect_tx(to, C::Queries::kBytes + kLseBytes);
    load_tile(smem.q[stage], told.maps.q, to, q.begin + t_first, head, 0);
    ptx::bulk_load(smem.lse[stage], gNumbers, kLseBytes, to);
    if constexpr (C::kQueriesFirst) load_dout();
  });
}

// A warp writes zeros to the rows of a tile from `row` on.
template <int kRows, int kColumns>
__device__ __forceinline__ void cut_off(SlabTile<kRows, kColumns>& sTile, int row) {
  using Tile = SlabTile<kRows, kColumns>;
  constexpr uint4 kZeros = {0, 0, 0, 0};
#pragma unroll 1
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    uint4* chunks = &sTile.chunks[slab][0][0];
#pragma unroll 1
    for (int i = row * Tile::kSlabChunks + ptx::lane_index(); i < kRows * Tile::kSlabChunks;
         i += kWarpSize) {
      chunks[i] = kZeros;
    }
  }
}

template <int kRows, int kColumns>
__device__ __forceinline__ void cut_off(HalvedTile<kRows, kColumns>& sTile, int row) {
  cut_off(sTile.halves[0], row);
  cut_off(sTile.halves[1], row);
}

// Waits for the tile, cuts it off and hands it on.
template <class Tile>
__device__ __forceinline__ void hand_on(Tile& sTile, int row, uint64_t* raw, unsigned parity,
                                        uint64_t* full) {
  ptx::mbarrier_wait(raw, parity);
  cut_off(sTile, row);
  ptx::fence_proxy_async();
  __syncwarp();
  if (ptx::lane_index() == 0) ptx::mbarrier_arrive(full);
}

// What a warp does with the tiles in which the sequence ends: k, v and, for every head, the last
// dout and q. Bit `stage` of the parities is that of its raw barrier.
template <class C>
__device__ __forceinline__ void cut_tiles(typename C::SharedStorage& smem,
                                          const QueryWalk<C>& walk) {
  auto& barriers = smem.barriers;
  const PackedRows &q = smem.packed.sequence.q, &k = smem.packed.sequence.k;
  if (walk.ragged) {
    hand_on(smem.k, k.length - walk.s_first, &smem.packed.k_raw, 0, &barriers.k_full);
    hand_on(smem.v, k.length - walk.s_first, &smem.packed.v_raw, 0, &barriers.v_full);
  }
  unsigned q_parities = 0, dout_parities = 0;
  walk.for_each([&](unsigned n, int, int t_first) {
    if (!ends_inside(q, t_first, C::kBlockT)) return;
    const auto cut_dout = [&] {
      const unsigned stage = n % C::kDoutStages;
      hand_on(smem.dout[stage], q.length - t_first, &smem.packed.dout_raw[stage],
              dout_parities >> stage & 1u, &barriers.dout_full[stage]);
      dout_parities ^= 1u << stage;
    };
    if constexpr (!C::kQueriesFirst) cut_dout();
    const unsigned stage = n % C::kQueryStages;
    hand_on(smem.q[stage], q.length - t_first, &smem.packed.q_raw[stage], q_parities >> stage & 1u,
            &barriers.q_full[stage]);
    q_parities ^= 1u << stage;
    if constexpr (C::kQueriesFirst) cut_dout();
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
