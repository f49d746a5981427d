// From q.k to masked scores and probabilities, in the registers of a product's fragments.
//
// Forward and weights hold [T, S] tiles, the pass over keys of the backward [S, T] tiles: kKeyRows
// says that a fragment's rows are keys. Each feature is one pass over the registers behind a branch
// that the whole grid takes alike.
#pragma once

#include <cfloat>

#include "common/vec.h"
#include "kernels/attention.h"
#include "kernels/attention_tile.h"
#include "ptx/lane.h"
#include "ptx/math.h"
#include "ptx/matrix.h"

namespace fused_lm {

// The query and the key of each value that a thread holds: those of its first value, and constant
// steps from there.
template <bool kKeyRows>
struct ScoreTile {
  int t_first, s_first;
  int T, S;
  int batch, head;

  static __device__ __forceinline__ constexpr int t_step(int m, int n, int e) {
    return kKeyRows ? column_step(n, e) : row_step(m, e);
  }
  static __device__ __forceinline__ constexpr int s_step(int m, int n, int e) {
    return kKeyRows ? row_step(m, e) : column_step(n, e);
  }
  __device__ __forceinline__ int t(int m, int n, int e) const { return t_first + t_step(m, n, e); }
  __device__ __forceinline__ int s(int m, int n, int e) const { return s_first + s_step(m, n, e); }
  __device__ __forceinline__ bool inside(int m, int n, int e) const {
    return t(m, n, e) < T && s(m, n, e) < S;
  }

 private:
  static __device__ __forceinline__ constexpr int row_step(int m, int e) {
    return kMmaRows * m + e / 2 * 8;
  }
  static __device__ __forceinline__ constexpr int column_step(int n, int e) {
    return kMmaColumns * n + e % 2;
  }
};

// Calls body(m, n, e) for every value of a tile.
template <int kM, int kN, class Body>
__device__ __forceinline__ void for_each_value(const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < kFragment; ++e) body(m, n, e);
    }
  }
}

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

// The bits of two neighbours.
template <DType kDType>
using RawPair = uint32_t[DTypeConstant<kDType>::bytes / 2];

template <DType kDType>
__device__ __forceinline__ void load_pair(RawPair<kDType>& raw, const char* p_pair, bool inside) {
  if constexpr (kDType == DType::kFloat32) {
    const uint2 both = inside ? *reinterpret_cast<const uint2*>(p_pair) : uint2{0, 0};
    raw[0] = both.x, raw[1] = both.y;
  } else {
    raw[0] = inside ? *reinterpret_cast<const uint32_t*>(p_pair) : 0;
  }
}

// Of an 8x8 matrix in registers, as ptx/matrix.h has it. One of 32-bit elements is two of 16 bits.
template <DType kDType>
__device__ __forceinline__ void transpose_pair(RawPair<kDType>& raw) {
  if constexpr (kDType == DType::kFloat32) {
    const uint32_t low = ptx::movmatrix_trans((raw[0] & 0xffffu) | raw[1] << 16);
    const uint32_t high = ptx::movmatrix_trans(raw[0] >> 16 | (raw[1] & 0xffff0000u));
    raw[0] = (low & 0xffffu) | high << 16;
    raw[1] = low >> 16 | (high & 0xffff0000u);
  } else {
    raw[0] = ptx::movmatrix_trans(raw[0]);
  }
}

// Adds a bias whose rows are pairs: an 8x8 matrix of queries and keys at a time.
template <DType kDType, bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void add_bias_pairs(float (&score)[kM][kN][kFragment],
                                               const ScoreTile<kKeyRows>& tile, const char* gHead,
                                               int64_t row_stride) {
  constexpr int kBytes = DTypeConstant<kDType>::bytes;
  constexpr int kQueries = kKeyRows ? kN : 2 * kM, kKeys = kKeyRows ? 2 * kM : kN;
  const FragmentLane at = fragment_lane(ptx::lane_index());
  const int t_first = tile.t_first + (kKeyRows ? at.row - at.column : 0);
  const int s_first = tile.s_first + (kKeyRows ? at.column - at.row : 0);
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int t = t_first + 8 * i;
    const char* gRow = address_of<kBytes>(gHead, t * row_stride + s_first);
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      RawPair<kDType> raw;
      load_pair<kDType>(raw, gRow + 8 * j * kBytes, t < tile.T && s_first + 8 * j < tile.S);
      if constexpr (kKeyRows) transpose_pair<kDType>(raw);
      float pair[2];
      if constexpr (kDType == DType::kFloat32) {
        pair[0] = __uint_as_float(raw[0]), pair[1] = __uint_as_float(raw[1]);
      } else {
        widen_pair<kDType>(pair, raw[0]);
      }
      const int row = kKeyRows ? j : i, n = kKeyRows ? i : j;
      score[row / 2][n][row % 2 * 2] += pair[0];
      score[row / 2][n][row % 2 * 2 + 1] += pair[1];
    }
  }
}

// Adds element (t, s) of the bias, whose dtype is a constant here.
template <DType kDType, bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void add_bias_of(float (&score)[kM][kN][kFragment],
                                            const ScoreTile<kKeyRows>& tile, const ScoreParams& p) {
  constexpr int kBytes = DTypeConstant<kDType>::bytes;
  const ScoreStrides& strides = p.bias_strides;
  const char* gHead =
      address_of<kBytes>(p.bias, tile.batch * strides.batch + tile.head * strides.head);
  if (p.bias_pairs) {
    add_bias_pairs<kDType>(score, tile, gHead, strides.row);
    return;
  }
  for_each_value<kM, kN>([&](int m, int n, int e) {
    if (!tile.inside(m, n, e)) return;
    const int64_t index = tile.t(m, n, e) * strides.row + tile.s(m, n, e) * strides.col;
    RawVector<1> raw;
    load_raw<kBytes, LoadPolicy::kCached>(raw, address_of<kBytes>(gHead, index));
    float value[1];
    widen<kDType>(value, raw);
    score[m][n][e] += value[0];
  });
}

template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void add_bias(float (&score)[kM][kN][kFragment],
                                         const ScoreTile<kKeyRows>& tile, const ScoreParams& p) {
  with_dtype(p.bias_dtype,
             [&](auto dtype) { add_bias_of<decltype(dtype)::value>(score, tile, p); });
}

// Which of four bytes are not 0: bit i of the result is byte i's.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t bytes) {
  const uint32_t high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  return high * 0x00204081u >> 28;  // 2^21 + 2^14 + 2^7 + 1: no two products meet
}

// The keys from `s` on that a row of the mask shows, a bit each, as all four lanes of a quad know
// them afterwards: each reads a quarter of the 16 or 32. Those outside are hidden.
__device__ __forceinline__ uint32_t visible_keys(const uint8_t* gRow, int s, int keys, bool inside,
                                                 int S, int quad) {
  const int own = keys / 4 * quad;
  uint32_t bits = 0;
  if (inside && s + own < S) {
    if (keys == 32) {
      const uint2 raw = *reinterpret_cast<const uint2*>(gRow + s + own);
      bits = nonzero_bytes(raw.x) | nonzero_bytes(raw.y) << 4;
    } else {
      bits = nonzero_bytes(*reinterpret_cast<const uint32_t*>(gRow + s + own));
    }
  }
  bits <<= own;
  bits |= __shfl_xor_sync(kAllLanes, bits, 1);
  return bits | __shfl_xor_sync(kAllLanes, bits, 2);
}

template <int kM, int kN>
__device__ __forceinline__ void hide_masked_octets(float (&score)[kM][kN][kFragment],
                                                   const ScoreTile<false>& tile,
                                                   const uint8_t* gHead, int64_t row_stride) {
  static_assert(kN % 2 == 0, "16 keys at least");
  const FragmentLane at = fragment_lane(ptx::lane_index());
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int e = 0; e < kFragment; e += 2) {
      const int t = tile.t(m, 0, e);
#pragma unroll
      for (int first = 0; first < kN; first += 4) {
        const int s = tile.s_first - at.column + first * kMmaColumns;
        const int keys = kN - first >= 4 ? 32 : 16;
        const uint32_t visible =
            visible_keys(gHead + t * row_stride, s, keys, t < tile.T, tile.S, at.column / 2) >>
            at.column;
#pragma unroll
        for (int n = first; n < kN && n < first + 4; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool shown = (visible >> ((n - first) * kMmaColumns + i) & 1u) != 0;
            score[m][n][e + i] = shown ? score[m][n][e + i] : kNoScore;
          }
        }
      }
    }
  }
}

// Each quad reads a query's keys, and tells those whose columns that query is in.
template <int kM, int kN>
__device__ __forceinline__ void hide_masked_octets(float (&score)[kM][kN][kFragment],
                                                   const ScoreTile<true>& tile,
                                                   const uint8_t* gHead, int64_t row_stride) {
  const FragmentLane at = fragment_lane(ptx::lane_index());
  const int s = tile.s_first - at.row;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int t = tile.t_first - at.column + n * kMmaColumns + at.row;
    const uint32_t mine =
        visible_keys(gHead + t * row_stride, s, kM * kMmaRows, t < tile.T, tile.S, at.column / 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t visible = __shfl_sync(kAllLanes, mine, 4 * (at.column + i)) >> at.row;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = i; e < kFragment; e += 2) {
          const bool shown = (visible >> (m * kMmaRows + e / 2 * 8) & 1u) != 0;
          score[m][n][e] = shown ? score[m][n][e] : kNoScore;
        }
      }
    }
  }
}

template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void hide_masked(float (&score)[kM][kN][kFragment],
                                            const ScoreTile<kKeyRows>& tile, const ScoreParams& p) {
  const ScoreStrides& strides = p.mask_strides;
  const uint8_t* gHead = p.mask + tile.batch * strides.batch + tile.head * strides.head;
  if (p.mask_octets) {
    hide_masked_octets(score, tile, gHead, strides.row);
    return;
  }
  for_each_value<kM, kN>([&](int m, int n, int e) {
    if (!tile.inside(m, n, e)) return;
    const int64_t index = tile.t(m, n, e) * strides.row + tile.s(m, n, e) * strides.col;
    score[m][n][e] = gHead[index] != 0 ? score[m][n][e] : kNoScore;
  });
}

// The warp reads each key's byte once, and hands out 32 of them as bits. Keys behind the last are
// hidden too.
template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void hide_masked_keys(float (&score)[kM][kN][kFragment],
                                                 const ScoreTile<kKeyRows>& tile,
                                                 const ScoreParams& p) {
  constexpr int kKeys = kKeyRows ? kM * kMmaRows : kN * kMmaColumns;
  const int lane = ptx::lane_index();
  const FragmentLane at = fragment_lane(lane);
  const int own = kKeyRows ? at.row : at.column;
  const uint8_t* gBatch = p.key_mask + tile.batch * p.key_mask_strides.batch;
#pragma unroll
  for (int first = 0; first < kKeys; first += kWarpSize) {
    const int s = tile.s_first - own + first + lane;
    const bool inside = first + lane < kKeys && s < tile.S;
    const bool visible = inside && gBatch[s * p.key_mask_strides.col] != 0;
    const uint32_t keys = __ballot_sync(kAllLanes, visible) >> own;
    for_each_value<kM, kN>([&](int m, int n, int e) {
      const int step = tile.s_step(m, n, e) - first;
      if (step < 0 || step >= kWarpSize) return;
      score[m][n][e] = (keys >> step & 1u) != 0 ? score[m][n][e] : kNoScore;
    });
  }
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
