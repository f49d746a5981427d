// What a group of consumers of Hopper's attention backward does in its registers: a tile of scores
// and dP becomes P, with dropout, and ds; and at the end rows of dk and dv are rounded. The groups
// of attention_bwd_sm90.h hold scores as [keys, queries], those of attention_bwd_wide_sm90.h as
// [queries, keys]: a tile tells by its type.
#pragma once

#include "kernels/attention_bwd_tiles_sm90.h"
#include "kernels/attention_dropout.h"
#include "kernels/attention_gradients.h"
#include "ptx/matrix.h"
#include "ptx/mbarrier.h"
#include "ptx/wgmma.h"

namespace fused_lm {

// lse or delta of the two queries that a thread has values of, where queries are a product's rows.
struct RowNumbersOfThread {
  float of_half[2];
};

// Calls body(m, n, e, number of the value's query) for every value of a tile.
template <class C, class Body>
__device__ __forceinline__ void for_each_query(const float* sNumbers, const Body& body) {
  for_each_in_columns<C>(sNumbers, body);
}

template <class C, class Body>
__device__ __forceinline__ void for_each_query(const RowNumbersOfThread& numbers,
                                               const Body& body) {
  for_each_value<C::kM, C::kScores>(
      [&](int m, int n, int e) { body(m, n, e, numbers.of_half[e / 2]); });
}

namespace attention_bwd {

// A tile of P or of ds as left operands, 16 columns each.
template <class C>
using Packed = uint32_t[C::kScores / 2][4];

template <class Element, class C>
__device__ __forceinline__ void pack(Packed<C>& packed, const Scores<C>& value) {
#pragma unroll
  for (int step = 0; step < C::kScores / 2; ++step) {
    pack_a<Element>(packed[step], value[0][2 * step], value[0][2 * step + 1]);
  }
}

// Issues product = a b^T over the columns of both tiles, a batch: scores and dP, either way.
template <class Element, class TileA, class TileB, int kN>
__device__ __forceinline__ void issue_transposed(float (&product)[kN][kFragment], uint64_t a,
                                                 uint64_t b) {
  static_assert(TileA::kColumns == TileB::kColumns);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < TileA::kColumns / kProductDepth; ++step) {
    ptx::wgmma_ss<Element, kN * kMmaColumns, ptx::Major::kK, ptx::Major::kK>(
        product, advanced(a, TileA::k_step(step)), advanced(b, TileB::k_step(step)), step > 0);
  }
  ptx::wgmma_commit();
}

// By a shuffle the compiler learns that a warp's lanes agree, and keeps descriptors once per warp.
__device__ __forceinline__ int consumer_group() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0) - 1;
}

// A thread's number within its group, read anew: what is kept of it costs spills. Divided as an
// unsigned, so that the compiler knows it is none below 0, and needs one instruction for what is
// made of it instead of four.
__device__ __forceinline__ int group_thread() {
  return static_cast<int>(ptx::thread_index() % kGroupThreads);
}

// One arrival for the whole warp: what its lanes and, behind a wgmma_wait, its products have read
// may be overwritten, and what they wrote may be read.
__device__ __forceinline__ void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

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

// The same where rows are queries: the end of the keys is one more bound of a row.
template <class C>
__device__ __forceinline__ void hide_ends(Scores<C>& score, const ScoreTile<false>& tile,
                                          const ScoreParams& how) {
  const int ahead = tile.t_first - tile.s_first, keys = tile.S - tile.s_first;
  int begin[2], end[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    begin[half] = ahead + 8 * half + how.lower;
    end[half] = min(ahead + 8 * half + how.upper, keys - 1);
  }
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
    score[m][n][e] = tile.s_step(m, n, e) > end[e / 2] ? kNoScore : score[m][n][e];
  });
  if (how.lower <= -tile.T) return;
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
    score[m][n][e] = tile.s_step(m, n, e) < begin[e / 2] ? kNoScore : score[m][n][e];
  });
}

// Scores of the plain kernels, q.k as it comes, become P by one multiply-add each: lse is in units
// of log2, but in tiles where one is huge, and another rounding than the forward's would show.
template <class C, class Numbers>
__device__ __forceinline__ void plain_probabilities(Scores<C>& score, const Numbers& lse,
                                                    bool is_huge, const ScoreParams& how) {
  // By a vote ptxas learns that the warp stays together.
  if (__any_sync(kAllLanes, is_huge)) {
    for_each_query<C>(lse, [&](int m, int n, int e, float own) {
      score[m][n][e] = probability<false>(score[m][n][e], own, how.scale);
    });
    return;
  }
  for_each_query<C>(lse, [&](int m, int n, int e, float own) {
    score[m][n][e] = ptx::exp2_approx(fmaf(score[m][n][e], how.scale_log2, -own));
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

// Scores that have come become P, while kPending batches that were issued later are under way.
template <class C, int kPending, class Consumer>
__device__ __forceinline__ void plain_scores(const Consumer& own, Scores<C>& score,
                                             const float* sLse, int head, int t_first) {
  ptx::wgmma_wait<kPending>();
  ptx::registers_fence(score[0]);
  if (own.walk.edge(t_first)) {
    hide_ends<C>(score, own.tile(head, t_first), own.params().score);
  }
  plain_probabilities<C>(score, own.numbers(sLse), sLse[C::kBlockT] != 0.0f, own.params().score);
  // Without it ptxas waits for what is under way before the exponentials.
  pin<C>(&own.smem.pinned[threadIdx.x - kGroupThreads], score);
}

// dP, the last that is under way, becomes ds.
template <class C, class Consumer>
__device__ __forceinline__ void plain_gradients(const Consumer& own, const Scores<C>& score,
                                                Scores<C>& dp, const float* sDelta) {
  ptx::wgmma_wait<0>();
  ptx::registers_fence(dp[0]);
  for_each_query<C>(own.numbers(sDelta), [&](int m, int n, int e, float delta) {
    dp[m][n][e] = score[m][n][e] * (dp[m][n][e] - delta);
  });
}

template <class C, class Consumer>
__device__ __forceinline__ void general_tile(const Consumer& own, Scores<C>& score, Scores<C>& dp,
                                             const float* sLse, const float* sDelta, int head,
                                             int t_first) {
  const AttentionBackwardParams& p = own.params();
  const auto tile = own.tile(head, t_first);
  const bool drops = p.dropout.rng != nullptr;
  ptx::wgmma_wait<0>();
  ptx::registers_fence(score[0]);
  ptx::registers_fence(dp[0]);
  uint32_t keep[C::kM];
  if (drops) {
    const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
    keep_mask<C::kM, C::kScores>(keep, tile, key, p.dropout.threshold);
    drop(dp, keep);
  }
  const float factor = drops ? p.dropout.scale : 1.0f;
  for_each_query<C>(own.numbers(sDelta), [&](int m, int n, int e, float delta) {
    dp[m][n][e] = fmaf(dp[m][n][e], factor, -delta);
  });
  finish_scores(score, tile, p.score, own.walk.edge(t_first),
                [&](int m, int n, int e, float tanh) { dp[m][n][e] *= fmaf(-tanh, tanh, 1.0f); });
  for_each_query<C>(own.numbers(sLse), [&](int m, int n, int e, float lse) {
    score[m][n][e] = probability<true>(score[m][n][e], lse, p.score.scale);
    dp[m][n][e] *= score[m][n][e];
  });
  if (drops) drop(score, keep);
}

// Scores and dP of a tile become P, with dropout, and ds. Both products are under way.
template <class C, class Consumer>
__device__ __forceinline__ void tile_gradients(const Consumer& own, Scores<C>& score, Scores<C>& dp,
                                               const float* sLse, const float* sDelta, int head,
                                               int t_first) {
  if constexpr (C::kGeneral) {
    general_tile<C>(own, score, dp, sLse, sDelta, head, t_first);
  } else {
    plain_scores<C, 1>(own, score, sLse, head, t_first);
    plain_gradients<C>(own, score, dp, sDelta);
  }
}

// What dv is multiplied by: dropout's scale, which P lacks.
template <class C>
__device__ __forceinline__ float kept_scale(const AttentionBackwardParams& p) {
  return C::kGeneral && p.dropout.rng != nullptr ? p.dropout.scale : 1.0f;
}

// A group's sums, 64 rows, to rows `first` .. of a tile that has as many columns.
template <class Element, class Tile, int kSums>
__device__ __forceinline__ void stage_rows(Tile& sRows, const float (&sums)[1][kSums][kFragment],
                                           float factor, int first) {
  const int thread = group_thread();
  const int row = first + thread / kWarpSize * kMmaRows + thread % kMmaRows;
#pragma unroll
  for (int pair = 0; pair < kSums / 2; ++pair) {
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

}  // namespace attention_bwd
}  // namespace fused_lm
