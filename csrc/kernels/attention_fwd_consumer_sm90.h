// What the consumers of the Hopper forward are made of: products, turns, and the end of a tile. The
// story is in attention_fwd_sm90.h.
#pragma once

#include "kernels/attention_fwd_tiles_sm90.h"
#include "kernels/attention_score_tile.h"
#include "kernels/attention_softmax_sm90.h"
#include "ptx/lane.h"
#include "ptx/matrix.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace fused_lm {
namespace attention_fwd {

// p of a tile, rounded: a left operand per 16 keys.
template <class C>
using Packed = uint32_t[C::kScores / 2][4];

template <class Element, class C>
__device__ __forceinline__ void pack(Packed<C>& packed, const Scores<C>& p) {
#pragma unroll
  for (int step = 0; step < C::kScores / 2; ++step) {
    pack_a<Element>(packed[step], p[0][2 * step], p[0][2 * step + 1]);
  }
}

// Issues score = q k^T, a batch.
template <class Element, class C>
__device__ __forceinline__ void issue_scores(Scores<C>& score, uint64_t q, uint64_t k) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kD / kProductDepth; ++step) {
    ptx::wgmma_ss<Element, C::kBlockS, ptx::Major::kK, ptx::Major::kK>(
        score[0], advanced(q, C::Queries::k_step(step)), advanced(k, C::Keys::k_step(step)),
        step > 0);
  }
  ptx::wgmma_commit();
}

// Issues acc += p v, a batch.
template <class Element, class C>
__device__ __forceinline__ void issue_sums(Sums<C>& acc, const Packed<C>& p, uint64_t v) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kBlockS / kProductDepth; ++step) {
    ptx::wgmma_rs<Element, C::kD, ptx::Major::kMn>(acc[0], p[step],
                                                   advanced(v, C::Keys::mn_step(step)), true);
  }
  ptx::wgmma_commit();
}

// What a consumer knows all along.
template <class C>
struct Consumer {
  typename C::SharedStorage& smem;
  const AttentionForwardParams& p;
  int group;

  __device__ __forceinline__ uint64_t queries(int place) const {
    return advanced(smem.q[0].k_major(group * kGroupRows), place * C::Queries::kBytes);
  }
  __device__ __forceinline__ uint64_t keys(int stage) const {
    return advanced(smem.k[0].k_major(0), stage * C::Keys::kBytes);
  }
  __device__ __forceinline__ uint64_t values(int stage) const {
    return advanced(smem.v[0].mn_major(), stage * C::Keys::kBytes);
  }
  // The values of a lane in a tile of scores.
  __device__ __forceinline__ ScoreTile<false> tile(const Work& work, int s_first) const {
    const FragmentLane at = fragment_lane(ptx::lane_index());
    const int warp = static_cast<int>(ptx::thread_index()) / kWarpSize - kGroupThreads / kWarpSize;
    const int row = warp * kMmaRows + at.row;
    return {work.tile.tile * C::kBlockT + row,
            s_first + at.column,
            p.shape.T,
            p.shape.S,
            work.tile.batch,
            work.tile.head};
  }
};

// -inf where the band or the end of the keys hides a key. A row has one bound on either side, and a
// tile mostly one side: two instructions per score.
template <class C>
__device__ __forceinline__ void hide_ends(Scores<C>& score, const Consumer<C>& own,
                                          const Work& work, int s_first) {
  const ScoreParams& how = own.p.score;
  const ScoreTile<false> tile = own.tile(work, s_first);
  const auto hide = [&](const auto& hides) {
    for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
      score[m][n][e] = hides(tile.s_step(m, n, e), e / 2) ? kNoScore : score[m][n][e];
    });
  };
  const int t_first = work.tile.tile * C::kBlockT + own.group * kGroupRows;
  const int ahead = tile.t_first - tile.s_first;
  if (s_first + C::kBlockS > min(t_first + how.upper + 1, tile.S)) {
    const int keys_left = tile.S - tile.s_first;
    const int end[2] = {min(ahead + how.upper + 1, keys_left),
                        min(ahead + how.upper + 1 + 8, keys_left)};
    hide([&](int step, int half) { return step >= end[half]; });
  }
  if (s_first < t_first + kGroupRows - 1 + how.lower) {
    const int begin[2] = {ahead + how.lower, ahead + how.lower + 8};
    hide([&](int step, int half) { return step < begin[half]; });
  }
}

// Groups issue products in turn: 0, 1, .., 0, ..; the last one's start gives the first its turn.
template <class C>
__device__ __forceinline__ void await_turn(int group) {
  if constexpr (C::kTurns) ptx::named_barrier_sync(kTurn + group, 2 * kGroupThreads);
}

template <class C>
__device__ __forceinline__ void pass_turn(int group) {
  const int next = group + 1 < C::kGroups ? group + 1 : 0;
  if constexpr (C::kTurns) ptx::named_barrier_arrive(kTurn + next, 2 * kGroupThreads);
}

// Passes over the first tiles of keys that no row of the group sees, and returns how many. They
// must have come before their places can be released. Where tiles of keys are as high as those of
// queries, the band of square attention leaves none.
template <class C>
__device__ __forceinline__ int pass_over_hidden(const Consumer<C>& own, const Work& work,
                                                unsigned n) {
  if constexpr (C::kBlockT <= C::kBlockS) return 0;
  auto& barriers = own.smem.barriers;
  const int last = work.tile.tile * C::kBlockT + (own.group + 1) * kGroupRows - 1;
  const int hidden = work.walk.hidden<C::kBlockS>(last + own.p.score.upper);
  for (int i = 0; i < hidden; ++i) {
    const Stage<C::kStages> at(n + i);
    await_turn<C>(own.group);
    pass_turn<C>(own.group);
    ptx::mbarrier_wait(&barriers.k_full[at.index], at.parity);
    release(&barriers.k_empty[at.index]);
    ptx::mbarrier_wait(&barriers.v_full[at.index], at.parity);
    release(&barriers.v_empty[at.index]);
  }
  return hidden;
}

// Stores lse, and makes out of acc.
template <class C>
__device__ __forceinline__ void finish_sums(const Consumer<C>& own, Rows<C>& rows,
                                            const Work& work) {
  const AttentionForwardParams& p = own.p;
  const ScoreTile<false> tile = own.tile(work, 0);
  const float unit = C::kGeneral ? 1.0f : p.score.scale;
  const float unit_log2 = C::kGeneral ? kLog2E : p.score.scale_log2;
  const float kept = C::kGeneral && p.dropout.rng != nullptr ? p.dropout.scale : 1.0f;
  float* gLse = p.lse + (static_cast<int64_t>(tile.batch) * p.shape.H + tile.head) * p.shape.T;
  RowValues<C> factor;
  for_each_row<C>([&](int m, int half) {
    const float sum = quad_sum(rows.sum[m][half]);
    const int t = tile.t(m, 0, 2 * half);
    if (ptx::lane_index() % 4 == 0 && t < p.shape.T) {
      gLse[t] = row_lse(rows.max[m][half], sum, unit, unit_log2);
    }
    factor[m][half] = sum == 0.0f ? 0.0f : __fdividef(kept, sum);
  });
  multiply_rows<C>(rows.acc, factor);
}

// A group's rows of out go through shared memory to where they belong, which is query t_first.
template <class Element, class C>
__device__ __forceinline__ void store_out(const Consumer<C>& own, const ptx::TensorMap& out_map,
                                          const Rows<C>& rows, const BlockTile& tile) {
  using Tile = typename C::Queries;
  auto& sOut = C::out_tile(own.smem);
  // Read anew: addresses that are kept all along cost spills.
  const int thread = static_cast<int>(ptx::thread_index()) % kGroupThreads;
  const int first = own.group * kGroupRows;
  const bool stores = thread == 0;
  if constexpr (C::kOwnOut) {
    // TMA has read the last out. Of q's place a warp writes the rows that only it has read.
    if (stores) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(kGroupDone + own.group, kGroupThreads);
  }
  const int row = first + thread / kWarpSize * kMmaRows + thread % kMmaRows;
#pragma unroll
  for (int pair = 0; pair < C::kSums / 2; ++pair) {
    uint32_t columns[4];
    pack_a<Element>(columns, rows.acc[0][2 * pair], rows.acc[0][2 * pair + 1]);
    ptx::stmatrix_x4(sOut.at(row, 2 * pair + thread % kWarpSize / kMmaRows), columns);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(kGroupDone + own.group, kGroupThreads);
  if (!stores) return;
  const int t_first = tile.tile * C::kBlockT + first;
  for (int slab = 0; slab < Tile::kSlabs && t_first < own.p.shape.T; ++slab) {
    const int column = slab * Tile::kSlabColumns;
    if (column >= own.p.shape.Dv) break;
    ptx::tma_store(out_map, &sOut.chunks[slab][first][0], {column, t_first, tile.head, tile.batch});
  }
  ptx::bulk_commit();
  if constexpr (!C::kOwnOut) {
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&own.smem.barriers.q_empty[0]);
  }
}

}  // namespace attention_fwd
}  // namespace fused_lm
