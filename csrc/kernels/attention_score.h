// From q.k to masked scores and probabilities, in the registers of a product's fragments. Each
// feature is one pass over the registers behind a branch that the whole grid takes alike.
#pragma once

#include <cfloat>

#include "kernels/attention.h"
#include "kernels/attention_bias.h"
#include "kernels/attention_mask.h"
#include "kernels/attention_score_tile.h"
#include "ptx/math.h"

namespace fused_lm {

// tanh within 2 ulp: below 0.55 an odd minimax polynomial, since 1 - 2 / (e^2x + 1) cancels there.
__device__ __forceinline__ float accurate_tanh(float x) {
  const float square = x * x;
  float poly = fmaf(square, 0.016437573f, -0.052671809f);
  poly = fmaf(square, poly, 0.13320725f);
  poly = fmaf(square, poly, -0.33332947f);
  const float size = fabsf(x);
  const float exponential = ptx::exp2_approx(size * (2.0f * kLog2E));
  const float large = 1.0f - __fdividef(2.0f, exponential + 1.0f);
  return size < 0.55f ? fmaf(x, square * poly, x) : copysignf(large, x);
}

// -inf where the band or the end of the keys hides a key. Rows behind the last query stay.
template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void hide_outside_band(float (&score)[kM][kN][kFragment],
                                                  const ScoreTile<kKeyRows>& tile, int lower,
                                                  int upper) {
  // Compared are constant steps, so that nothing but these three is held.
  const int ahead = tile.s_first - tile.t_first;
  const int least = lower - ahead;
  const int most = upper - ahead;
  const int keys_left = tile.S - tile.s_first;
  for_each_value<kM, kN>([&](int m, int n, int e) {
    const int s_step = tile.s_step(m, n, e);
    const int step = s_step - tile.t_step(m, n, e);
    const bool visible = s_step < keys_left && step >= least && step <= most;
    score[m][n][e] = visible ? score[m][n][e] : kNoScore;
  });
}

// q.k to scores in natural units, rounded there, -inf where a key is hidden. `edge`: the band may
// end in this tile. With a cap, on_cap(m, n, e, tanh) hears of every value.
template <bool kKeyRows, int kM, int kN, class OnCap>
__device__ __forceinline__ void finish_scores(float (&score)[kM][kN][kFragment],
                                              const ScoreTile<kKeyRows>& tile, const ScoreParams& p,
                                              bool edge, const OnCap& on_cap) {
  for_each_value<kM, kN>(
      [&](int m, int n, int e) { score[m][n][e] = __fmul_rn(score[m][n][e], p.scale); });
  if (p.softcap > 0.0f) {
    const float inverse = 1.0f / p.softcap;
    for_each_value<kM, kN>([&](int m, int n, int e) {
      const float tanh = accurate_tanh(score[m][n][e] * inverse);
      score[m][n][e] = p.softcap * tanh;
      on_cap(m, n, e, tanh);
    });
  }
  if (p.bias != nullptr) add_bias(score, tile, p);
  if (p.mask != nullptr) hide_masked(score, tile, p);
  if (p.key_mask != nullptr) hide_masked_keys(score, tile, p);
  if (edge) hide_outside_band(score, tile, p.lower, p.upper);
}

template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void finish_scores(float (&score)[kM][kN][kFragment],
                                              const ScoreTile<kKeyRows>& tile, const ScoreParams& p,
                                              bool edge) {
  finish_scores(score, tile, p, edge, [](int, int, int, float) {});
}

// The same, and what the cap's derivative multiplies gradients by; untouched without a cap.
template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void finish_scores(float (&score)[kM][kN][kFragment],
                                              float (&slope)[kM][kN][kFragment],
                                              const ScoreTile<kKeyRows>& tile, const ScoreParams& p,
                                              bool edge) {
  finish_scores(score, tile, p, edge,
                [&](int m, int n, int e, float tanh) { slope[m][n][e] = fmaf(-tanh, tanh, 1.0f); });
}

// P = exp(score - lse), of a general kernel's finished score or a plain one's q.k. The score is
// rounded as in the forward, and lse subtracted before the change of base: a bias may move both by
// 1e9 or to the edge of fp32, where other roundings are off by 2^7 or infinite.
template <bool kGeneral>
__device__ __forceinline__ float probability(float score, float lse, float scale) {
  return ptx::exp2_approx(((kGeneral ? score : __fmul_rn(score, scale)) - lse) * kLog2E);
}

// Whether the kernels without features can run it. Their scale times log2(e) must be a normal
// number, because -inf times 0 is NaN, and positive, because hidden scores are -inf before it.
inline bool is_plain(const ScoreParams& score, const DropoutParams& dropout) {
  return score.mask == nullptr && score.key_mask == nullptr && score.bias == nullptr &&
         score.softcap == 0.0f && dropout.rng == nullptr && score.scale >= FLT_MIN;
}

}  // namespace fused_lm
