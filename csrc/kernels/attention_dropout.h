// Dropout of probabilities in the registers of a product's fragments.
#pragma once

#include "common/philox.h"
#include "kernels/attention_score.h"

namespace fused_lm {

// Which values dropout keeps: bit 4 n + e of word m. The tile begins at multiples of 8 keys.
//
// One call of Philox decides about eight keys of a query. Of those a thread of [T, S] fragments
// holds two, so the four threads of a row draw for four neighbouring products and hand round a bit
// per key; a thread of [S, T] fragments holds one of each of four, so a warp draws for two
// products.
template <int kM, int kN>
__device__ __forceinline__ void keep_mask(uint32_t (&keep)[kM], const ScoreTile<false>& tile,
                                          const DropoutKey& key, uint32_t threshold) {
  static_assert(kN <= 8, "a word has 32 bits");
  const int lane = own_lane();
  const int quad = lane % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    keep[m] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = tile.t(m, 0, 2 * half);
#pragma unroll
      for (int n = 0; n < kN; n += 4) {
        const int64_t keys = tile.s_first / kPhiloxLanes + n + quad;
        const uint32_t mine = keep_bits(dropout_words(key, t, keys), threshold);
#pragma unroll
        for (int i = 0; i < 4 && n + i < kN; ++i) {
          const uint32_t bits = __shfl_sync(kAllLanes, mine, lane - quad + i) >> 2 * quad;
          keep[m] |= (bits & 3u) << (4 * (n + i) + 2 * half);
        }
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void keep_mask(uint32_t (&keep)[kM], const ScoreTile<true>& tile,
                                          const DropoutKey& key, uint32_t threshold) {
  static_assert(kN % 2 == 0 && kN <= 8, "two products share their draws, and a word has 32 bits");
  const int lane = own_lane();
  const FragmentLane at = fragment_lane(lane);
  const int t_first = tile.t_first - at.column + lane / 16 * kMmaColumns + lane % 8;
  const int keys_first = tile.s_first / kPhiloxLanes + lane / 8 % 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    keep[m] = 0;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const PhiloxWords words = dropout_words(key, t_first + n * kMmaColumns, keys_first + 2 * m);
      const uint32_t mine = keep_bits(words, threshold);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < kFragment; ++e) {
          const int source = 16 * i + e / 2 * 8 + at.column + e % 2;
          const uint32_t bits = __shfl_sync(kAllLanes, mine, source) >> at.row;
          keep[m] |= (bits & 1u) << (4 * (n + i) + e);
        }
      }
    }
  }
}

// Zeros where dropout drops; what is kept is not scaled.
template <int kM, int kN>
__device__ __forceinline__ void drop(float (&value)[kM][kN][kFragment],
                                     const uint32_t (&keep)[kM]) {
  for_each_value<kM, kN>([&](int m, int n, int e) {
    value[m][n][e] = (keep[m] >> (4 * n + e) & 1u) != 0 ? value[m][n][e] : 0.0f;
  });
}

template <bool kKeyRows, int kM, int kN>
__device__ __forceinline__ void drop(float (&value)[kM][kN][kFragment],
                                     const ScoreTile<kKeyRows>& tile, const DropoutKey& key,
                                     uint32_t threshold) {
  uint32_t keep[kM];
  keep_mask<kM, kN>(keep, tile, key, threshold);
  drop(value, keep);
}

// The same for one row of fragments of any width: eight of them at a time, since a word has 32
// bits.
template <int kFirst = 0, int kN>
__device__ __forceinline__ void drop_wide(float (&value)[1][kN][kFragment], ScoreTile<false> tile,
                                          const DropoutKey& key, uint32_t threshold) {
  constexpr int kHere = kN - kFirst < 8 ? kN - kFirst : 8;
  uint32_t keep[1];
  keep_mask<1, kHere>(keep, tile, key, threshold);
#pragma unroll
  for (int n = 0; n < kHere; ++n) {
#pragma unroll
    for (int e = 0; e < kFragment; ++e) {
      float& own = value[0][kFirst + n][e];
      own = (keep[0] >> (4 * n + e) & 1u) != 0 ? own : 0.0f;
    }
  }
  if constexpr (kFirst + kHere < kN) {
    tile.s_first += kHere * kMmaColumns;
    drop_wide<kFirst + kHere>(value, tile, key, threshold);
  }
}

}  // namespace fused_lm
