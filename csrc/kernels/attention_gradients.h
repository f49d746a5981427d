// lse and delta, and what they make of scores and dP in the backward:
//
//   P = exp(score - lse)          ds = P (factor dP - delta)
//
// Both are numbers of a query. In the pass over keys queries are a product's columns, and a tile
// brings their numbers; in the pass over queries they are its rows, and the block's own.
#pragma once

#include "kernels/attention_products.h"
#include "kernels/attention_score.h"
#include "ptx/lane.h"

namespace fused_lm {

// Of a tile's queries, as columns.
template <int kQueries>
struct ColumnNumbers {
  float row_lse[kQueries];
  float delta[kQueries];
};

// Starts the copies; zeros behind the last query, whose q and dout are zeros too. The first
// 2 kQueries threads copy one number each.
template <int kThreads, int kQueries>
__device__ __forceinline__ void copy_numbers(ColumnNumbers<kQueries>& numbers,
                                             const AttentionBackwardParams& p, int batch, int head,
                                             int t_first) {
  static_assert(2 * kQueries <= kThreads, "a thread copies one lse or one delta");
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2 * kQueries) {
    const bool of_lse = thread < kQueries;
    const int i = of_lse ? thread : thread - kQueries;
    const int t = t_first + i;
    const int64_t index = (static_cast<int64_t>(batch) * p.shape.H + head) * p.shape.T + t;
    ptx::cp_async_small<4>((of_lse ? numbers.row_lse : numbers.delta) + i,
                           (of_lse ? p.row_lse : p.delta) + index, t < p.shape.T ? 4 : 0);
  }
}

// Calls body(m, n, e, number of the value's column) for every value of a tile.
template <class C, class Body>
__device__ __forceinline__ void for_each_in_columns(const float* sNumbers, const Body& body) {
  const int column = fragment_lane(ptx::lane_index()).column;
#pragma unroll
  for (int n = 0; n < C::kScores; ++n) {
    const float2 own = *reinterpret_cast<const float2*>(sNumbers + kMmaColumns * n + column);
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int e = 0; e < kFragment; ++e) body(m, n, e, e % 2 == 0 ? own.x : own.y);
    }
  }
}

// Scores become P.
template <class C>
__device__ __forceinline__ void probabilities(Scores<C>& score, const float* sLse, float scale) {
  for_each_in_columns<C>(sLse, [&](int m, int n, int e, float lse) {
    score[m][n][e] = probability<C::kGeneral>(score[m][n][e], lse, scale);
  });
}

// dP becomes factor dP - delta, of which P makes ds.
template <class C>
__device__ __forceinline__ void subtract_delta(Scores<C>& dp, const float* sDelta, float factor) {
  for_each_in_columns<C>(sDelta, [&](int m, int n, int e, float delta) {
    dp[m][n][e] = fmaf(dp[m][n][e], factor, -delta);
  });
}

// dP becomes ds.
template <class C>
__device__ __forceinline__ void score_gradients(Scores<C>& dp, const Scores<C>& p,
                                                const float* sDelta, float factor) {
  for_each_in_columns<C>(sDelta, [&](int m, int n, int e, float delta) {
    dp[m][n][e] = p[m][n][e] * fmaf(dp[m][n][e], factor, -delta);
  });
}

// Of a block's queries, as rows: in registers, eight for 32 rows, they spill.
template <int kQueries>
struct RowNumbers {
  float2 lse_delta[kQueries];  // +inf and 0 behind the last query
};

template <int kThreads, int kQueries>
__device__ __forceinline__ void load_numbers(RowNumbers<kQueries>& numbers,
                                             const AttentionBackwardParams& p, int batch, int head,
                                             int t_first) {
  const int thread = static_cast<int>(threadIdx.x);
  static_assert(kQueries <= kThreads, "a thread loads one row's");
  if (thread >= kQueries) return;
  const int t = t_first + thread;
  const int64_t index = (static_cast<int64_t>(batch) * p.shape.H + head) * p.shape.T + t;
  const bool inside = t < p.shape.T;
  const float lse = inside ? p.row_lse[index] : INFINITY;
  const float delta = inside ? p.delta[index] : 0.0f;
  // One store of integers: two of floats meet bank conflicts, and g++ announces none to the
  // harness.
  const uint2 both = {__float_as_uint(lse), __float_as_uint(delta)};
  *reinterpret_cast<uint2*>(&numbers.lse_delta[thread]) = both;
}

// Calls body(m, n, e, lse and delta of the value's row) for every value of a tile.
template <class C, int kQueries, class Body>
__device__ __forceinline__ void for_each_in_rows(const RowNumbers<kQueries>& numbers, int row,
                                                 int lane, const Body& body) {
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 own = numbers.lse_delta[row + m * kMmaRows + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) body(m, n, e, own);
      }
    }
  }
}

template <class C, int kQueries>
__device__ __forceinline__ void probabilities(Scores<C>& score, const RowNumbers<kQueries>& numbers,
                                              int row, int lane, float scale) {
  for_each_in_rows<C>(numbers, row, lane, [&](int m, int n, int e, const float2& own) {
    score[m][n][e] = probability<C::kGeneral>(score[m][n][e], own.x, scale);
  });
}

template <class C, int kQueries>
__device__ __forceinline__ void subtract_delta(Scores<C>& dp, const RowNumbers<kQueries>& numbers,
                                               int row, int lane, float factor) {
  for_each_in_rows<C>(numbers, row, lane, [&](int m, int n, int e, const float2& own) {
    dp[m][n][e] = fmaf(dp[m][n][e], factor, -own.y);
  });
}

// dP becomes ds, from scores that are not P yet.
template <class C, int kQueries>
__device__ __forceinline__ void score_gradients(Scores<C>& dp, const Scores<C>& score,
                                                const RowNumbers<kQueries>& numbers, int row,
                                                int lane, float scale, float factor) {
  for_each_in_rows<C>(numbers, row, lane, [&](int m, int n, int e, const float2& own) {
    const float prob = probability<C::kGeneral>(score[m][n][e], own.x, scale);
    dp[m][n][e] = prob * fmaf(dp[m][n][e], factor, -own.y);
  });
}

}  // namespace fused_lm
