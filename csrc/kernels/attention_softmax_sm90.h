// The online softmax for tiles of 64 queries per warpgroup: the rule of attention_softmax.h, with
// one multiply-add per score.
//
//   M = max c, rounded, for c = unit_log2;  p = 2^(s c - M)
//
// A multiply-add rounds once, so p has the rounding error of M as a factor, 2^(M - max c), and all
// of a row's p have the same one. The factor that a new maximum puts on the sums, 2^(M - M'), has
// it too, so it cancels in out; lse takes it out. But p is rounded to 16 bits and its sum is not:
// where M is large, the largest p were not 1 and a row of one key not its value; where it is huge,
// p would overflow. So from |M| > 2^10 on a row subtracts its maximum first, as attention_softmax.h
// does always; below, the error is an eleventh of what fp16 is rounded by.
//
// Both are rare. A row has a limit, below which its scores raise no maximum; one vote asks whether
// a lane of the warp has a score above its row's limit, without a word from the quad that shares
// the row. Where a row is huge or has seen no key (M = -inf), the limit is -inf. What the branch
// does to a row depends on this row alone.
#pragma once

#include <cfloat>

#include "kernels/attention_softmax.h"

namespace fused_lm {
namespace attention_fwd {

constexpr float kLargestBase = 1024.0f;  // below, M is off by 2^-14 at most, p by 2^-14.5
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ bool is_huge(float base) { return fabsf(base) > kLargestBase; }

// Rows, and what p subtracts in its exponent, and up to which score.
template <class C>
struct BasedRows : Rows<C> {
  RowValues<C> base, limit;
};

template <class C>
__device__ __forceinline__ void start_based_rows(BasedRows<C>& rows) {
  start_rows<C>(rows);
  for_each_row<C>([&](int m, int half) {
    rows.base[m][half] = 0.0f;
    rows.limit[m][half] = kNoScore;
  });
}

// How many units a score may be above the maximum; finite, so that above -inf it is nothing.
__device__ __forceinline__ float growth_of(float unit_log2) {
  return fminf(kGrowthLog2 / unit_log2, FLT_MAX);
}

// Raises maxima where a tile of scores outgrows them. Returns whether the sums are to be multiplied
// by decay: false in most tiles.
template <class C>
__device__ __forceinline__ bool raise_bases(Scores<C>& score, BasedRows<C>& rows,
                                            RowValues<C>& decay, float unit_log2, float growth) {
  RowValues<C> largest;
  lane_maxima<C>(largest, score, rows);
  bool rare = false;
  for_each_row<C>([&](int m, int half) { rare |= largest[m][half] > rows.limit[m][half]; });
  if (!__any_sync(kAllLanes, rare)) return false;
  RowValues<C> shift;
  bool shifts = false;
  for_each_row<C>([&](int m, int half) {
    const float before = rows.max[m][half], found = quad_max(largest[m][half]);
    const bool outgrown = found > before + growth;
    const float max = outgrown ? found : before;
    const float base = __fmul_rn(max, unit_log2);
    const bool huge = is_huge(base);
    const float fall = (before - max) * unit_log2;
    const float rounded_fall = __fmul_rn(before, unit_log2) - base;
    decay[m][half] = outgrown ? ptx::exp2_approx(huge ? fall : rounded_fall) : 1.0f;
    rows.max[m][half] = max;
    rows.sum[m][half] *= decay[m][half];
    rows.base[m][half] = huge ? 0.0f : base;
    rows.limit[m][half] = huge ? kNoScore : max + growth;
    shift[m][half] = huge && max != kNoScore ? max : 0.0f;
    shifts |= shift[m][half] != 0.0f;
  });
  if (__any_sync(kAllLanes, shifts)) {
    for_each_value<C::kM, C::kScores>(
        [&](int m, int n, int e) { score[m][n][e] -= shift[m][e / 2]; });
  }
  return true;
}

// Scores become p.
template <class C>
__device__ __forceinline__ void exponentials(Scores<C>& score, BasedRows<C>& rows,
                                             float unit_log2) {
  for_each_row<C>([&](int m, int half) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        score[m][n][e] = ptx::exp2_approx(fmaf(score[m][n][e], unit_log2, -rows.base[m][half]));
        sum += score[m][n][e];
      }
    }
    rows.sum[m][half] += sum;
  });
}

template <class C>
__device__ __forceinline__ void multiply_rows(Sums<C>& acc, const RowValues<C>& factor) {
  for_each_row<C>([&](int m, int half) {
#pragma unroll
    for (int n = 0; n < C::kSums; ++n) {
      acc[m][n][2 * half] *= factor[m][half];
      acc[m][n][2 * half + 1] *= factor[m][half];
    }
  });
}

// lse of a row whose p sum up to `sum`. unit: unit_log2 ln 2. The maximum is scaled as a backward
// scales scores, so that it finds the same p; what M was rounded by, which is in all p, is taken
// out of their sum.
__device__ __forceinline__ float row_lse(float max, float sum, float unit, float unit_log2) {
  if (sum == 0.0f) return kNoScore;
  const float base = __fmul_rn(max, unit_log2);
  const float cut_off = is_huge(base) ? 0.0f : fmaf(max, unit_log2, -base);
  return __fmul_rn(max, unit) + (logf(sum) - cut_off * kLn2);
}

}  // namespace attention_fwd
}  // namespace fused_lm
