// What the passes over single [T, S] tiles share: products whose columns come in slices, so that
// one kernel serves every head dim, and probabilities from a known lse.
//
// Shared memory: two slices, each rows of the left operand [block_t, 64] and of the right one
// [block_s, 64]. While one is multiplied the next one is on its way into the other. One barrier per
// slice says that the copies of all threads have landed, and that nobody reads the slice any more
// which the next copies go to. The last slice of a product brings the first one of the next
// product.
#pragma once

#include "kernels/attention_dropout.h"
#include "kernels/attention_products.h"
#include "kernels/attention_score.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_sliced {

template <SlicedPass kPass>
struct Config {
  static constexpr SlicedTuning kTuning = sliced_tuning(kPass);
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockT = kTuning.block_t();
  static constexpr int kBlockS = kTuning.block_s;
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kN = kBlockS / kMmaColumns;
  static_assert(kBlockS == kSliceColumns, "results leave through the rows of a slice");

  struct Slice {
    SharedTile<kBlockT, kSliceColumns> rows;
    SharedTile<kBlockS, kSliceColumns> keys;
  };
};

// Values of a warp's [16 kM, block_s] part of a tile.
template <class C>
using Product = float[C::kM][C::kN][kFragment];

// Where a tile of [T, S] begins.
struct TilePlace {
  int t, s;
};

// Whether anything in a tile is visible, and whether the band or the end of the keys is in it.
struct TileBand {
  bool visible, edge;
};

template <class C>
__device__ __forceinline__ TileBand tile_band(const TilePlace& place, const AttentionShape& shape,
                                              const ScoreParams& score) {
  const int last = min(place.t + C::kBlockT, shape.T) - 1;
  const BandTiles band = band_tiles<C::kBlockS>(place.t, last, shape.S, score.lower, score.upper);
  const bool visible = place.s >= band.begin && place.s < band.begin + band.count * C::kBlockS;
  return {visible, place.s < band.full_begin || place.s >= band.full_end};
}

// A thread's values in a tile. Computed anew for each head: else the addresses of a mask and a
// bias, the same for all heads but for a base, are computed before the loop, and kept in memory.
template <class C>
__device__ __forceinline__ ScoreTile<false> score_tile(const TilePlace& place,
                                                       const AttentionShape& shape, int row,
                                                       int batch, int head) {
  const FragmentLane at = fragment_lane(ptx::lane_index());
  return {place.t + row + at.row, place.s + at.column, shape.T, shape.S, batch, head};
}

// The two matrices of a product: [T, columns] and [S, columns].
struct Operands {
  const uint16_t* gRows;
  const uint16_t* gKeys;
  int64_t rows_stride, keys_stride;
  int columns;
};

// Of attention_weights and of attention_dbias alike: q and k of a head.
template <class Params>
__device__ __forceinline__ Operands queries_and_keys(const Params& p, int batch, int head) {
  return {p.q + head_offset(p.q_strides, batch, head),
          p.k + head_offset(p.k_strides, batch, head / p.shape.group), p.q_strides.row,
          p.k_strides.row, p.shape.D};
}

template <class C>
__device__ __forceinline__ void copy_slice(typename C::Slice& slice, const Operands& operands,
                                           const TilePlace& place, const AttentionShape& shape,
                                           int column) {
  const int columns = operands.columns - column;
  copy_rows_async<C::kThreads>(slice.rows, operands.gRows + column, operands.rows_stride, place.t,
                               shape.T, columns);
  copy_rows_async<C::kThreads>(slice.keys, operands.gKeys + column, operands.keys_stride, place.s,
                               shape.S, columns);
  ptx::cp_async_commit();
}

// product = rows keys^T, for a warp's rows from `row` on. Slice 0 is on its way into slices[own];
// next(slice) starts what comes after this product. Afterwards `own` says where that went: nobody
// reads there.
template <class Element, class C, class Next>
__device__ __forceinline__ void multiply_slices(Product<C>& product, const Operands& operands,
                                                const TilePlace& place, const AttentionShape& shape,
                                                typename C::Slice (&slices)[2], int& own, int row,
                                                const Next& next) {
  const int lane = own_lane();
  fill_zero(product);
  for (int column = 0; column < operands.columns; column += kSliceColumns) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    typename C::Slice& slice = slices[own];
    own = 1 - own;
    if (column + kSliceColumns < operands.columns) {
      copy_slice<C>(slices[own], operands, place, shape, column + kSliceColumns);
    } else {
      next(slices[own]);
    }
    add_transposed<Element>(product, shared_operands(slice.rows, lane, row), slice.keys, lane);
  }
}

// A number per row of [B, H, T], for the rows of a thread's values; `outside` behind the last one.
template <class C>
__device__ __forceinline__ void load_row_values(float (&value)[C::kM][2], const float* gValues,
                                                const ScoreTile<false>& tile, int heads,
                                                float outside) {
  const float* gHead = gValues + (static_cast<int64_t>(tile.batch) * heads + tile.head) * tile.T;
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = tile.t(m, 0, 2 * half);
      value[m][half] = t < tile.T ? gHead[t] : outside;
    }
  }
}

// q.k becomes P = e^(score - lse): 0 where a key is hidden, in rows without a key and behind the
// last one. The difference is taken in natural units, where it is nearly exact.
template <class C>
__device__ __forceinline__ void finish_probabilities(Product<C>& score,
                                                     const ScoreTile<false>& tile,
                                                     const ScoreParams& p, bool edge,
                                                     const float* gLse, int heads) {
  finish_scores(score, tile, p, edge);
  float lse[C::kM][2];
  load_row_values<C>(lse, gLse, tile, heads, kNoScore);
  for_each_value<C::kM, C::kN>([&](int m, int n, int e) {
    const float base = lse[m][e / 2] == kNoScore ? -kNoScore : lse[m][e / 2];
    score[m][n][e] = ptx::exp2_approx((score[m][n][e] - base) * kLog2E);
  });
}

// Writes a warp's 16-bit results to rows t .. and columns s .. of gMatrix [T, S], contiguous,
// through its own rows of sRows. Rows start at multiples of 16 bytes only where S is a multiple
// of 8.
template <DType kDType, class C, class Tile>
__device__ __forceinline__ void store_tile(uint16_t* gMatrix, const Product<C>& value, float factor,
                                           const TilePlace& place, const AttentionShape& shape,
                                           Tile& sRows, int row) {
  stage_sums<kDType, 1>(value, [&](int, int) { return factor; }, sRows, row, 0);
  __syncwarp();
  const int lane = own_lane();
  const int rows = min(C::kM * kMmaRows, shape.T - place.t - row);
  const int columns = min(C::kBlockS, shape.S - place.s);
  uint16_t* gTile = gMatrix + (place.t + row) * static_cast<int64_t>(shape.S) + place.s;
  if (shape.S % kChunkElements == 0) {
    constexpr int kRowsAtOnce = kWarpSize / Tile::kChunks;
    const int chunk = lane % Tile::kChunks;
    if (chunk * kChunkElements >= columns) return;
#pragma unroll 4
    for (int i = lane / Tile::kChunks; i < rows; i += kRowsAtOnce) {
      uint16_t* gChunk = gTile + i * static_cast<int64_t>(shape.S) + chunk * kChunkElements;
      *reinterpret_cast<uint4*>(gChunk) = *sRows.at(row + i, chunk);
    }
    return;
  }
  constexpr int kElements = C::kBlockS / kWarpSize;
#pragma unroll 4
  for (int i = 0; i < rows; ++i) {
    uint16_t* gRow = gTile + i * static_cast<int64_t>(shape.S);
    uint16_t element[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int column = lane + j * kWarpSize;
      const void* sChunk = sRows.at(row + i, column / kChunkElements);
      element[j] = static_cast<const uint16_t*>(sChunk)[column % kChunkElements];
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int column = lane + j * kWarpSize;
      if (column < columns) gRow[column] = element[j];
    }
  }
}

}  // namespace attention_sliced
}  // namespace fused_lm
