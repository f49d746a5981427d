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
// Both are rare, so one vote asks for any row of the warp that has outgrown its maximum, is huge,
// or has seen no key (M = -inf). What the branch does to a row depends on this row alone.
#pragma once

#include "kernels/attention_softmax.h"

namespace fused_lm {
namespace attention_fwd {

constexpr float kLargestBase = 1024.0f;  // below, M is off by 2^-14 at most, p by 2^-14.5
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ bool is_huge(float base) { return fabsf(base) > kLargestBase; }

// Sets each row's base, what p subtracts in its exponent. Returns whether the sums are to be
// multiplied by decay: false in most tiles.
template <class C>
__device__ __forceinline__ bool find_bases(Scores<C>& score, Rows<C>& rows, RowValues<C>& base,
                                           RowValues<C>& decay, float unit_log2) {
  RowValues<C> largest;
  row_maxima<C>(largest, score, rows);
  bool rare = false;
  for_each_row<C>([&](int m, int half) {
    const float max = rows.max[m][half];
    base[m][half] = __fmul_rn(max, unit_log2);
    decay[m][half] = 1.0f;
    rare |= (largest[m][half] - max) * unit_log2 > kGrowthLog2 || is_huge(base[m][half]);
  });
  if (!__any_sync(kAllLanes, rare)) return false;
  for_each_row<C>([&](int m, int half) {
    const float before = rows.max[m][half], base_before = base[m][half];
    const bool outgrown = (largest[m][half] - before) * unit_log2 > kGrowthLog2;
    const float max = outgrown ? largest[m][half] : before;
    const float rounded = __fmul_rn(max, unit_log2);
    const bool huge = is_huge(rounded);
    const float fall = huge ? (before - max) * unit_log2 : base_before - rounded;
    decay[m][half] = outgrown ? ptx::exp2_approx(fall) : 1.0f;
    rows.max[m][half] = max;
    rows.sum[m][half] *= decay[m][half];
    base[m][half] = huge ? 0.0f : rounded;
    const float shift = huge && max != kNoScore ? max : 0.0f;
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
      score[m][n][2 * half] -= shift;
      score[m][n][2 * half + 1] -= shift;
    }
  });
  return true;
}

template <class C>
__device__ __forceinline__ void exponentials_above(Scores<C>& score, Rows<C>& rows,
                                                   const RowValues<C>& base, float unit_log2) {
  for_each_row<C>([&](int m, int half) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        score[m][n][e] = ptx::exp2_approx(fmaf(score[m][n][e], unit_log2, -base[m][half]));
        sum += score[m][n][e];
      }
    }
    rows.sum[m][half] += sum;
  });
}

// Scores become p. Returns whether the sums are to be multiplied by decay.
template <class C>
__device__ __forceinline__ bool softmax_tile(Scores<C>& score, Rows<C>& rows, RowValues<C>& decay,
                                             float unit_log2) {
  RowValues<C> base;
  const bool decays = find_bases<C>(score, rows, base, decay, unit_log2);
  exponentials_above<C>(score, rows, base, unit_log2);
  return decays;
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
