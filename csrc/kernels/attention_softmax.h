// The online softmax: what a warp of the forward knows of its rows, and what a tile of scores does
// to it.
//
//   where rowmax s > m + 8 ln 2:  m' = rowmax s,  l = l e^(m - m'),  acc = acc e^(m - m')
//   p = e^(s - m');  l = l + rowsum p
//
// m need not be the maximum, only near it: sums and p stay finite as long as p <= 2^8. So the sums,
// D numbers per thread, are scaled for the first tile and rarely again, and not for every tile.
// No row's bits depend on another one's: changing a token changes none before it.
//
// Sources: Milakov & Gimelshein 2018 (arXiv:1805.02867) alg. 3; Dao 2023 (arXiv:2307.08691) alg. 1.
#pragma once

#include "kernels/attention_products.h"
#include "ptx/math.h"

namespace fused_lm {
namespace attention_fwd {

// A number per row of a warp: of row 16 m + 8 half + lane / 4.
template <class C>
using RowValues = float[C::kM][2];

// What a warp knows of its rows: sums of p v, and per row the running maximum and sum of p.
template <class C>
struct Rows {
  Sums<C> acc;
  RowValues<C> max;
  RowValues<C> sum;  // of this lane's columns
};

// Calls body(m, half) for each of a thread's rows.
template <class C, class Body>
__device__ __forceinline__ void for_each_row(const Body& body) {
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) body(m, half);
  }
}

template <class C>
__device__ __forceinline__ void start_rows(Rows<C>& rows) {
  fill_zero(rows.acc);
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
    rows.max[m][0] = rows.max[m][1] = kNoScore;
    rows.sum[m][0] = rows.sum[m][1] = 0.0f;
  }
}

// How far above the maximum that was subtracted a score may come, in powers of 2, before the sums
// are scaled down for it: p <= 2^8 is exact enough in 16 bits, and sums of p in fp32.
constexpr float kGrowthLog2 = 8.0f;

// The largest of each row's maximum so far and the scores of it that a lane has.
template <class C>
__device__ __forceinline__ void lane_maxima(RowValues<C>& largest, const Scores<C>& score,
                                            const Rows<C>& rows) {
  for_each_row<C>([&](int m, int half) {
    float found = rows.max[m][half];
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
      found = fmaxf(found, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
    }
    largest[m][half] = found;
  });
}

// The same of all its scores.
template <class C>
__device__ __forceinline__ void row_maxima(RowValues<C>& largest, const Scores<C>& score,
                                           const Rows<C>& rows) {
  lane_maxima<C>(largest, score, rows);
  for_each_row<C>([&](int m, int half) { largest[m][half] = quad_max(largest[m][half]); });
}

// Rows that have outgrown their maximum get the largest that was found, and their sums so far
// shrink; the others' are multiplied by 1. One branch for the warp: the first tile takes it, and
// few of the others. A row that has seen no key has -inf, and -inf - -inf, NaN, is no growth.
template <class C>
__device__ __forceinline__ void raise_maxima(Rows<C>& rows, const RowValues<C>& largest,
                                             float unit_log2) {
  const auto growth = [&](int m, int half) {
    return (largest[m][half] - rows.max[m][half]) * unit_log2;
  };
  bool any = false;
  for_each_row<C>([&](int m, int half) { any |= growth(m, half) > kGrowthLog2; });
  if (!__any_sync(kAllLanes, any)) return;
  for_each_row<C>([&](int m, int half) {
    const float rise = growth(m, half);
    const bool outgrown = rise > kGrowthLog2;
    const float decay = outgrown ? ptx::exp2_approx(-rise) : 1.0f;
    rows.max[m][half] = outgrown ? largest[m][half] : rows.max[m][half];
    rows.sum[m][half] *= decay;
#pragma unroll
    for (int n = 0; n < C::kSums; ++n) {
      rows.acc[m][n][2 * half] *= decay;
      rows.acc[m][n][2 * half + 1] *= decay;
    }
  });
}

// Scores become p = 2^(unit_log2 (score - max)), where max is the row's maximum or up to
// 2^kGrowthLog2 below it. It is subtracted before the change of base: one fused multiply-add per
// score less an add would leave every p with the rounding error of the scaled maximum in its
// exponent, which is 64 for scores of 1e9.
template <class C>
__device__ __forceinline__ void exponentials(Scores<C>& score, Rows<C>& rows, float unit_log2) {
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = rows.max[m][half] == kNoScore ? 0.0f : rows.max[m][half];
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[m][n][e] = ptx::exp2_approx((score[m][n][e] - base) * unit_log2);
          sum += score[m][n][e];
        }
      }
      rows.sum[m][half] += sum;
    }
  }
}

template <class C>
__device__ __forceinline__ void online_softmax(Scores<C>& score, Rows<C>& rows, float unit_log2) {
  RowValues<C> largest;
  row_maxima<C>(largest, score, rows);
  raise_maxima<C>(rows, largest, unit_log2);
  exponentials<C>(score, rows, unit_log2);
}

// Stores lse of a warp's rows, whose first one is query `first`, if it is this warp's to store.
// Their sums, of which total(m, half) makes the whole ones, become what acc is multiplied by.
template <class C, class Total>
__device__ __forceinline__ void finish_rows(const AttentionForwardParams& p, Rows<C>& rows,
                                            const BlockTile& block, int first, bool stores,
                                            float unit, float dropout_scale, const Total& total) {
  const FragmentLane at = fragment_lane(own_lane());
  float* gLse = p.lse + (static_cast<int64_t>(block.batch) * p.shape.H + block.head) * p.shape.T;
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = total(m, half);
      const int t = first + m * kMmaRows + half * 8 + at.row;
      if (stores && at.column == 0 && t < p.shape.T) {
        gLse[t] = sum == 0.0f ? kNoScore : __fmul_rn(rows.max[m][half], unit) + logf(sum);
      }
      rows.sum[m][half] = sum == 0.0f ? 0.0f : __fdividef(dropout_scale, sum);
    }
  }
}

}  // namespace attention_fwd
}  // namespace fused_lm
