// Hides what a mask or a key mask hides in a tile of scores: bytes are read once per warp, and
// handed round as bits.
#pragma once

#include "kernels/attention.h"
#include "kernels/attention_score_tile.h"
#include "ptx/lane.h"

namespace fused_lm {

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

}  // namespace fused_lm
