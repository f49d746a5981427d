// What a group of consumers of Hopper's attention backward does with its 64 keys: products of the
// warpgroup, and the values of a tile in its registers. The story is in attention_bwd_sm90.h.
#pragma once

#include <cstddef>

#include "kernels/attention_bwd_group_sm90.h"
#include "kernels/attention_bwd_producer_sm90.h"
#include "ptx/barrier.h"
#include "ptx/wgmma_n48.h"

namespace fused_lm {
namespace attention_bwd {

// A group's part of a tile of dq, transposed.
template <class C>
using DqTile = float[C::kDq][kFragment];

// Issues sums += a b over the queries, a batch: dv of P^T and dout, dk of ds^T and q.
template <class Element, class C>
__device__ __forceinline__ void issue_sums(Sums<C>& sums, const Packed<C>& a, uint64_t b) {
  ptx::registers_fence(sums[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    ptx::wgmma_rs<Element, C::kD, ptx::Major::kMn>(sums[0], a[step],
                                                   advanced(b, C::Queries::mn_step(step)), true);
  }
  ptx::wgmma_commit();
}

// Issues dq^T = k^T ds^T over the block's keys, a batch.
template <class Element, class C>
__device__ __forceinline__ void issue_dq(DqTile<C>& dq, uint64_t k, uint64_t ds) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kBlockS / kProductDepth; ++step) {
    ptx::wgmma_ss<Element, C::kDqQueries, ptx::Major::kMn, ptx::Major::kK>(
        dq, advanced(k, C::Keys::mn_step(step)), advanced(ds, C::Gradients::k_step(step)),
        step > 0);
  }
  ptx::wgmma_commit();
}

// What a consumer knows all along.
template <class C>
struct Consumer {
  using SharedStorage = typename C::SharedStorage;
  SharedStorage& smem;
  const typename C::Params& told;
  const QueryWalk<C>& walk;
  int group;

  // One sequence's where they lie packed, made anew each time: what is kept costs registers.
  __device__ __forceinline__ decltype(auto) params() const { return C::params(told, smem); }
  __device__ __forceinline__ uint64_t own_keys() const {
    return smem.k.k_major(group * kGroupKeys);
  }
  __device__ __forceinline__ uint64_t own_values() const {
    return advanced(own_keys(), offsetof(SharedStorage, v) - offsetof(SharedStorage, k));
  }
  // k^T, all keys of the group's columns.
  __device__ __forceinline__ uint64_t turned_keys() const {
    constexpr int kSlabColumns = C::Keys::kSlabColumns;
    return advanced(smem.k.mn_major(), C::dq_column(group) / kSlabColumns * C::Keys::kSlabBytes);
  }
  __device__ __forceinline__ uint64_t queries(unsigned stage) const {
    return advanced(smem.q[0].k_major(0), stage * C::Queries::kBytes);
  }
  // The other tiles of queries from the first ones, v from k: an addition, where a descriptor made
  // from an address of its own is four instructions, in every tile of queries.
  __device__ __forceinline__ uint64_t douts(unsigned stage) const {
    return advanced(queries(stage), offsetof(SharedStorage, dout) - offsetof(SharedStorage, q));
  }
  __device__ __forceinline__ uint64_t turned_queries(unsigned stage) const {
    return queries(stage) + turn();
  }
  __device__ __forceinline__ uint64_t turned_douts(unsigned stage) const {
    return douts(stage) + turn();
  }
  // From k_major of a tile of queries to mn_major, which has a distance of slabs.
  static __device__ __forceinline__ uint64_t turn() {
    constexpr uint32_t kNotRead = 16;  // what k_major has there
    return uint64_t{C::Queries::kSlabBytes - kNotRead} >> 4 << 16;
  }
  __device__ __forceinline__ uint64_t gradients(unsigned buffer) const {
    return advanced(smem.ds[0].k_major(C::dq_query(group)), buffer * C::Gradients::kBytes);
  }
  // The values of a lane in a tile of scores.
  __device__ __forceinline__ ScoreTile<true> tile(int head, int t_first) const {
    const FragmentLane at = fragment_lane(ptx::lane_index());
    const int row = group * kGroupKeys + group_thread() / kWarpSize * kMmaRows + at.row;
    const AttentionShape& shape = params().shape;
    return {t_first + at.column, walk.s_first + row, shape.T, shape.S, walk.batch, head};
  }
  static __device__ __forceinline__ const float* numbers(const float* sNumbers) { return sNumbers; }
};

// Issues a group's scores of tile n, or its dP, as soon as what they are made of has come.
template <class Element, class C>
__device__ __forceinline__ void issue_scores(const Consumer<C>& own, Scores<C>& score, unsigned n) {
  const unsigned stage = n % kStages;
  ptx::mbarrier_wait(&own.smem.barriers.q_full[stage], n / kStages % 2);
  issue_transposed<Element, typename C::Keys, typename C::Queries>(score[0], own.own_keys(),
                                                                   own.queries(stage));
}

template <class Element, class C>
__device__ __forceinline__ void issue_dp(const Consumer<C>& own, Scores<C>& dp, unsigned n) {
  const unsigned stage = n % kStages;
  ptx::mbarrier_wait(&own.smem.barriers.dout_full[stage], n / kStages % 2);
  issue_transposed<Element, typename C::Keys, typename C::Queries>(dp[0], own.own_values(),
                                                                   own.douts(stage));
}

// ds^T of a group's keys to its slab of ds [queries, keys].
template <class C>
__device__ __forceinline__ void store_gradients(typename C::Gradients& sDs, const Packed<C>& ds,
                                                int group) {
  const int thread = group_thread(), lane = thread % kWarpSize;
  const int query = lane % 8 + lane / 16 * 8;
  const int chunk = thread / kWarpSize * (kMmaRows / kChunkElements) + lane / 8 % 2;
  static_assert(C::Gradients::kSlabColumns == kGroupKeys);
  uint4* sRow = sDs.at(query, chunk) + group * (C::Gradients::kSlabBytes / sizeof(uint4));
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    ptx::stmatrix_x4_trans(sRow + step * kProductDepth * C::Gradients::kSlabChunks, ds[step]);
  }
  ptx::fence_proxy_async();
}

// A group's part of dq of tile n to the thread that adds it.
template <class C>
__device__ __forceinline__ void hand_over_dq(const Consumer<C>& own, const DqTile<C>& dq,
                                             unsigned n) {
  auto& barriers = own.smem.barriers;
  ptx::mbarrier_wait(&barriers.dq_empty[own.group], n % 2 ^ 1u);
  auto* sDq = reinterpret_cast<uint4*>(own.smem.dq.group[own.group]) + group_thread();
#pragma unroll
  for (int i = 0; i < C::kDq; ++i) {
    const uint4 quad = {__float_as_uint(dq[i][0]), __float_as_uint(dq[i][1]),
                        __float_as_uint(dq[i][2]), __float_as_uint(dq[i][3])};
    sDq[i * kGroupThreads] = quad;
  }
  ptx::fence_proxy_async();
  release(&barriers.dq_full[own.group]);
}

// The same part is on its way to the sums.
template <class C>
__device__ __forceinline__ void add_dq(const Consumer<C>& own, const DqTile<C>& dq, unsigned n,
                                       int head, int t_first) {
  if constexpr (C::kBulkAdds) {
    hand_over_dq<C>(own, dq, n);
  } else {
    const int thread = group_thread();
    if (!C::has_dq(own.group, thread)) return;
    float* gSums = dq_sums<C>(own.told, own.walk, head, t_first, own.group) + thread * kFragment;
#pragma unroll
    for (int i = 0; i < C::kDq; ++i) ptx::add_quad(gSums + i * C::kFragmentStride, dq[i]);
  }
}

template <class C>
__device__ __forceinline__ void send_rows(const ptx::TensorMap& map, const typename C::Keys& sRows,
                                          const Consumer<C>& own, int columns, int key_head) {
  using Tile = typename C::Keys;
  const int first = own.group * kGroupKeys;
  for (int slab = 0; slab < Tile::kSlabs && slab * Tile::kSlabColumns < columns; ++slab) {
    ptx::tma_store(map, &sRows.chunks[slab][first][0],
                   {slab * Tile::kSlabColumns, own.walk.first_key + own.walk.s_first + first,
                    key_head, own.walk.batch});
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
