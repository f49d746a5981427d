// What a group of consumers of Hopper's attention backward does with its 64 keys: products of the
// warpgroup, and the values of a tile in its registers. The story is in attention_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_producer_sm90.h"
#include "kernels/attention_dropout.h"
#include "kernels/attention_gradients.h"
#include "ptx/barrier.h"
#include "ptx/wgmma.h"

namespace fused_lm {
namespace attention_bwd {

// A tile of P or of ds as left operands: [64 keys, 16 queries] each.
template <class C>
using Packed = uint32_t[C::kSteps][4];
// A group's part of a tile of dq, transposed.
template <class C>
using DqTile = float[C::kDq][kFragment];

template <class Element, class C>
__device__ __forceinline__ void pack(Packed<C>& packed, const Scores<C>& value) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    pack_a<Element>(packed[step], value[0][2 * step], value[0][2 * step + 1]);
  }
}

// Issues product = a b^T over the columns, a batch: scores k q^T, dP v dout^T.
template <class Element, class C>
__device__ __forceinline__ void issue_transposed(Scores<C>& product, uint64_t a, uint64_t b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kD / kProductDepth; ++step) {
    ptx::wgmma_ss<Element, C::kBlockT, ptx::Major::kK, ptx::Major::kK>(
        product[0], advanced(a, C::Keys::k_step(step)), advanced(b, C::Queries::k_step(step)),
        step > 0);
  }
  ptx::wgmma_commit();
}

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

// One arrival for the whole warp: what its lanes and, behind a wgmma_wait, its products have read
// may be overwritten, and what they wrote may be read.
__device__ __forceinline__ void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

// What a consumer knows all along.
template <class C>
struct Consumer {
  typename C::SharedStorage& smem;
  const HopperBackwardParams& hopper;
  const QueryWalk<C>& walk;
  int group;

  __device__ __forceinline__ uint64_t own_keys() const {
    return smem.k.k_major(group * kGroupKeys);
  }
  __device__ __forceinline__ uint64_t own_values() const {
    return smem.v.k_major(group * kGroupKeys);
  }
  // k^T, all keys of the group's columns.
  __device__ __forceinline__ uint64_t turned_keys() const {
    constexpr int kSlabColumns = C::Keys::kSlabColumns;
    return advanced(smem.k.mn_major(), C::dq_column(group) / kSlabColumns * C::Keys::kSlabBytes);
  }
  __device__ __forceinline__ uint64_t queries(unsigned stage) const {
    return advanced(smem.q[0].k_major(0), stage * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t douts(unsigned stage) const {
    return advanced(smem.dout[0].k_major(0), stage * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t turned_queries(unsigned stage) const {
    return advanced(smem.q[0].mn_major(), stage * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t turned_douts(unsigned stage) const {
    return advanced(smem.dout[0].mn_major(), stage * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t gradients(unsigned buffer) const {
    return advanced(smem.ds[0].k_major(C::dq_query(group)), buffer * C::Gradients::kBytes);
  }
  // A thread's number within its group, and its warp's, read anew: what is kept of them costs
  // spills.
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(ptx::thread_index()) % kGroupThreads;
  }
  // The values of a lane in a tile of scores.
  __device__ __forceinline__ ScoreTile<true> tile(int head, int t_first) const {
    const FragmentLane at = fragment_lane(ptx::lane_index());
    const int row = group * kGroupKeys + thread() / kWarpSize * kMmaRows + at.row;
    const AttentionShape& shape = hopper.p.shape;
    return {t_first + at.column, walk.s_first + row, shape.T, shape.S, walk.batch, head};
  }
};

// -inf where the band or the end of the keys hides one. A key has one bound on either side, and
// most bands one side: two instructions per score.
template <class C>
__device__ __forceinline__ void hide_ends(Scores<C>& score, const ScoreTile<true>& tile,
                                          const ScoreParams& how) {
  constexpr int kNever = 1 << 30;
  const int ahead = tile.s_first - tile.t_first;
  int begin[2], end[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    begin[half] = tile.s_first + 8 * half < tile.S ? ahead + 8 * half - how.upper : kNever;
    end[half] = ahead + 8 * half - how.lower;
  }
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
    score[m][n][e] = tile.t_step(m, n, e) < begin[e / 2] ? kNoScore : score[m][n][e];
  });
  if (how.lower <= -tile.T) return;
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
    score[m][n][e] = tile.t_step(m, n, e) > end[e / 2] ? kNoScore : score[m][n][e];
  });
}

// Scores of the plain kernels, q.k as it comes, become P by one multiply-add each: lse is in units
// of log2, but in tiles where one is huge, and another rounding than the forward's would show.
template <class C>
__device__ __forceinline__ void plain_probabilities(Scores<C>& score, const float* sLse,
                                                    const ScoreParams& how) {
  // By a vote ptxas learns that the warp stays together.
  if (__any_sync(kAllLanes, sLse[C::kBlockT] != 0.0f)) {
    probabilities<C>(score, sLse, how.scale);
    return;
  }
  for_each_in_columns<C>(sLse, [&](int m, int n, int e, float lse) {
    score[m][n][e] = ptx::exp2_approx(fmaf(score[m][n][e], how.scale_log2, -lse));
  });
}

// One store that depends on every value: behind it ptxas can't move the next wait up.
template <class C>
__device__ __forceinline__ void pin(float* pinned, const Scores<C>& value) {
  uint32_t all = 0;
  for_each_value<C::kM, C::kScores>(
      [&](int m, int n, int e) { all ^= __float_as_uint(value[m][n][e]); });
  ptx::store_pinned(pinned, __uint_as_float(all));
}

// ds^T of a group's keys to its slab of ds [queries, keys].
template <class C>
__device__ __forceinline__ void store_gradients(typename C::Gradients& sDs, const Packed<C>& ds,
                                                int group) {
  const int thread = Consumer<C>::thread(), lane = thread % kWarpSize;
  const int query = lane % 8 + lane / 16 * 8;
  const int chunk = (group * kGroupKeys + thread / kWarpSize * kMmaRows) / kChunkElements;
  uint4* sRow = sDs.at(query, chunk + lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    ptx::stmatrix_x4_trans(sRow + step * kProductDepth * C::Gradients::kSlabChunks, ds[step]);
  }
  ptx::fence_proxy_async();
}

// A group's part of a tile of dq is on its way to the sums.
template <class C>
__device__ __forceinline__ void add_dq(const Consumer<C>& own, const DqTile<C>& dq, unsigned n,
                                       int head, int t_first) {
  const int thread = Consumer<C>::thread();
  if constexpr (C::kBulkAdds) {
    auto& barriers = own.smem.barriers;
    ptx::mbarrier_wait(&barriers.dq_empty[own.group], n % 2 ^ 1u);
    auto* sDq = reinterpret_cast<uint4*>(own.smem.dq.group[own.group]) + thread;
#pragma unroll
    for (int i = 0; i < C::kDq; ++i) {
      const uint4 quad = {__float_as_uint(dq[i][0]), __float_as_uint(dq[i][1]),
                          __float_as_uint(dq[i][2]), __float_as_uint(dq[i][3])};
      sDq[i * kGroupThreads] = quad;
    }
    ptx::fence_proxy_async();
    release(&barriers.dq_full[own.group]);
  } else {
    if (!C::has_dq(own.group, thread)) return;
    float* gSums = dq_sums<C>(own.hopper, own.walk, head, t_first, own.group) + thread * kFragment;
#pragma unroll
    for (int i = 0; i < C::kDq; ++i) ptx::add_quad(gSums + i * C::kFragmentStride, dq[i]);
  }
}

// A group's rows of dk and dv go through those of k and v to where they belong.
template <class Element, class C>
__device__ __forceinline__ void stage_rows(typename C::Keys& sRows, const Sums<C>& sums,
                                           float factor, int group) {
  const int thread = Consumer<C>::thread();
  const int row = group * kGroupKeys + thread / kWarpSize * kMmaRows + thread % kMmaRows;
#pragma unroll
  for (int pair = 0; pair < C::kSums / 2; ++pair) {
    float left[kFragment], right[kFragment];
#pragma unroll
    for (int e = 0; e < kFragment; ++e) {
      left[e] = sums[0][2 * pair][e] * factor;
      right[e] = sums[0][2 * pair + 1][e] * factor;
    }
    uint32_t columns[4];
    pack_a<Element>(columns, left, right);
    ptx::stmatrix_x4(sRows.at(row, 2 * pair + thread % kWarpSize / kMmaRows), columns);
  }
}

template <class C>
__device__ __forceinline__ void send_rows(const ptx::TensorMap& map, const typename C::Keys& sRows,
                                          const Consumer<C>& own, int columns, int key_head) {
  using Tile = typename C::Keys;
  const int first = own.group * kGroupKeys;
  for (int slab = 0; slab < Tile::kSlabs && slab * Tile::kSlabColumns < columns; ++slab) {
    ptx::tma_store(map, &sRows.chunks[slab][first][0],
                   {slab * Tile::kSlabColumns, own.walk.s_first + first, key_head, own.walk.batch});
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
