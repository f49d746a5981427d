// Adds a bias to a tile of scores: pairs of neighbours at a time where its rows allow it, turned in
// registers where queries are the columns.
#pragma once

#include "common/vec.h"
#include "kernels/attention.h"
#include "kernels/attention_score_tile.h"
#include "ptx/lane.h"
#include "ptx/matrix.h"

namespace fused_lm {

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

}  // namespace fused_lm
