// What a group of consumers of Hopper's wide attention backward does with its 64 queries and its
// half of the columns. The story is in attention_bwd_wide_sm90.h.
#pragma once

#include "kernels/attention_bwd_group_sm90.h"
#include "kernels/attention_bwd_producer_sm90.h"
#include "kernels/attention_bwd_wide_tiles_sm90.h"
#include "ptx/barrier.h"
#include "ptx/matrix.h"

namespace fused_lm {
namespace attention_bwd {

// What a consumer knows all along.
template <class C>
struct WideConsumer {
  typename C::SharedStorage& smem;
  const typename C::Params& told;
  const QueryWalk<C>& walk;
  int group;

  // As Consumer's.
  __device__ __forceinline__ decltype(auto) params() const { return C::params(told, smem); }
  __device__ __forceinline__ uint64_t queries(unsigned stage) const {
    return advanced(smem.q[0].k_major(group * kGroupQueries), stage * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t douts(unsigned stage) const {
    return advanced(smem.dout[0].k_major(group * kGroupQueries), stage * C::Queries::kBytes);
  }
  // All queries of the group's columns.
  __device__ __forceinline__ uint64_t turned_queries(unsigned stage) const {
    return advanced(smem.q[0].halves[0].mn_major(),
                    stage * C::Queries::kBytes + group * C::Queries::Half::kBytes);
  }
  __device__ __forceinline__ uint64_t turned_douts(unsigned stage) const {
    return advanced(smem.dout[0].halves[0].mn_major(),
                    stage * C::Queries::kBytes + group * C::Queries::Half::kBytes);
  }
  // A thread's number within its group, and its first row there, read anew: what is kept of them
  // costs spills.
  static __device__ __forceinline__ int thread() { return group_thread(); }
  static __device__ __forceinline__ int row() {
    return thread() / kWarpSize * kMmaRows + fragment_lane(ptx::lane_index()).row;
  }
  // The values of a lane in a tile of scores.
  __device__ __forceinline__ ScoreTile<false> tile(int head, int t_first) const {
    const AttentionShape& shape = params().shape;
    return {t_first + group * kGroupQueries + row(),
            walk.s_first + fragment_lane(ptx::lane_index()).column,
            shape.T,
            shape.S,
            walk.batch,
            head};
  }
  __device__ __forceinline__ RowNumbersOfThread numbers(const float* sNumbers) const {
    const float* sOwn = sNumbers + group * kGroupQueries + row();
    return {{sOwn[0], sOwn[8]}};
  }
};

// Issues sums += weights^T b over the queries, a batch: dv of P and dout, dk of ds and q.
template <class Element, class C>
__device__ __forceinline__ void issue_half(Sums<C>& sums, const typename C::Weights& sWeights,
                                           uint64_t b) {
  const uint64_t a = sWeights.mn_major();
  ptx::registers_fence(sums[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kBlockT / kProductDepth; ++step) {
    ptx::wgmma_ss<Element, C::kHalf, ptx::Major::kMn, ptx::Major::kMn>(
        sums[0], advanced(a, C::Weights::mn_step(step)),
        advanced(b, C::Queries::Half::mn_step(step)), true);
  }
  ptx::wgmma_commit();
}

// Issues a half of the columns of dq = ds k, a batch.
template <class Element, class C>
__device__ __forceinline__ void issue_dq_half(Sums<C>& dq, const Packed<C>& ds, uint64_t k) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kBlockS / kProductDepth; ++step) {
    ptx::wgmma_rs<Element, C::kHalf, ptx::Major::kMn>(
        dq[0], ds[step], advanced(k, C::Keys::Half::mn_step(step)), step > 0);
  }
  ptx::wgmma_commit();
}

template <class C>
__device__ __forceinline__ void add_dq_half(const WideConsumer<C>& own, const Sums<C>& dq, int half,
                                            int head, int t_first) {
  float* gSums = dq_sums<C>(own.told, own.walk, head, t_first, own.group) +
                 half * C::kSums * C::kFragmentStride + own.thread() * kFragment;
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) ptx::add_quad(gSums + i * C::kFragmentStride, dq[0][i]);
}

// P or ds of a group's queries to its rows of a tile.
template <class C>
__device__ __forceinline__ void store_weights(typename C::Weights& sWeights,
                                              const Packed<C>& packed, int group) {
  const int thread = WideConsumer<C>::thread();
  const int row = thread / kWarpSize * kMmaRows + thread % kMmaRows;
  static_assert(C::Weights::kSlabs == 1 && kGroupQueries % kAtomRows == 0);
  const int of_group = group * kGroupQueries * C::Weights::kSlabChunks;
#pragma unroll
  for (int step = 0; step < C::kBlockS / kProductDepth; ++step) {
    uint4* sRow = sWeights.at(row, 2 * step + thread % kWarpSize / kMmaRows);
    ptx::stmatrix_x4(sRow + of_group, packed[step]);
  }
}

// All slabs of dk or dv, 64 rows.
template <class C>
__device__ __forceinline__ void send_tile(const ptx::TensorMap& map, const typename C::Keys& sRows,
                                          const QueryWalk<C>& walk, int columns, int key_head) {
  using Half = typename C::Keys::Half;
  for (int half = 0; half < 2; ++half) {
    for (int slab = 0; slab < Half::kSlabs; ++slab) {
      const int column = half * C::kHalf + slab * Half::kSlabColumns;
      if (column >= columns) return;
      ptx::tma_store(map, &sRows.halves[half].chunks[slab][0][0],
                     {column, walk.first_key + walk.s_first, key_head, walk.batch});
    }
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
