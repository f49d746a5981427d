// Gradient of the attention bias: dscore, summed over the dims that the bias broadcasts along.
//
//   dscore = P (dropout(dout v^T) - delta),   P = e^(score - lse)
//
// Grid: one block per (tile of [T, S], head, batch) of the bias, where a dim of size 1 has one
// tile. A block walks over all tiles of the scores that share its own, batches slowest and keys
// fastest, and sums in registers: always in one order, without atomics. A bias of [1, H, T, S] is B
// tiles per block; one of a single element is all of them in one block: right, and slow. Tiles
// outside of the band are passed over.
//
// A warp owns 16 rows and all keys of the tile. Where the bias broadcasts along the keys, a row's
// sum is met in quads of lanes at the end; along the queries, lanes of a warp and then the warps
// meet, in order.
//
// Pipeline: slices of 64 columns as attention_sliced.h says: those of q and k, those of dout and v,
// those of the next tile. Results leave through the slice that nobody reads.
//
// Bytes: writes dbias once; q, k, v, dout come from the L2, 2 (D + Dv) (64 + 64) per tile of the
// scores. FLOPs: 2 B H T S (D + Dv), both rounded up to 64.
#pragma once

#include "kernels/attention_sliced.h"

namespace fused_lm {
namespace attention_dbias {

using attention_sliced::Operands;
using attention_sliced::TilePlace;
using C = attention_sliced::Config<SlicedPass::kDbias>;
using Product = attention_sliced::Product<C>;

constexpr int kTotalsPerLane = C::kBlockS / kWarpSize;

struct SharedStorage {
  C::Slice slices[2];
};

// A sum per warp and key, at the end in the slice that nobody reads.
using ColumnSums = float[C::kTuning.warps][C::kBlockS];
static_assert(sizeof(ColumnSums) <= sizeof(C::Slice), "they take the place of a slice");

// A tile of the scores, and the order of those that share a tile of the bias.
struct Walk {
  int s_tile, t_tile, head, batch;

  static __device__ __forceinline__ int t_tiles(const AttentionShape& shape) {
    return (shape.T + C::kBlockT - 1) / C::kBlockT;
  }
  static __device__ __forceinline__ int s_tiles(const AttentionShape& shape) {
    return (shape.S + C::kBlockS - 1) / C::kBlockS;
  }
  __device__ __forceinline__ TilePlace place() const {
    return {t_tile * C::kBlockT, s_tile * C::kBlockS};
  }
  __device__ __forceinline__ bool done(const AttentionDbiasParams& p, const Walk& first) const {
    return batch >= (p.sizes.B == 1 ? p.shape.B : first.batch + 1);
  }
  __device__ __forceinline__ void step(const AttentionDbiasParams& p, const Walk& first) {
    if (++s_tile < (p.sizes.S == 1 ? s_tiles(p.shape) : first.s_tile + 1)) return;
    s_tile = first.s_tile;
    if (++t_tile < (p.sizes.T == 1 ? t_tiles(p.shape) : first.t_tile + 1)) return;
    t_tile = first.t_tile;
    if (++head < (p.sizes.H == 1 ? p.shape.H : first.head + 1)) return;
    head = first.head;
    ++batch;
  }
  // This tile, or the next one in which anything is visible.
  __device__ __forceinline__ void skip_hidden(const AttentionDbiasParams& p, const Walk& first) {
    while (!done(p, first) && !attention_sliced::tile_band<C>(place(), p.shape, p.score).visible) {
      step(p, first);
    }
  }
};

__device__ __forceinline__ Walk first_tile(const AttentionDbiasParams& p, int batch_first) {
  const unsigned tiles = p.sizes.S == 1 ? 1u : static_cast<unsigned>(Walk::s_tiles(p.shape));
  return {static_cast<int>(blockIdx.x % tiles), static_cast<int>(blockIdx.x / tiles),
          static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z) + batch_first};
}

__device__ __forceinline__ Operands dout_and_values(const AttentionDbiasParams& p,
                                                    const Walk& walk) {
  return {p.dout + head_offset(p.dout_strides, walk.batch, walk.head),
          p.v + head_offset(p.v_strides, walk.batch, walk.head / p.shape.group), p.dout_strides.row,
          p.v_strides.row, p.shape.Dv};
}

__device__ __forceinline__ void copy_first_slice(const AttentionDbiasParams& p, C::Slice& slice,
                                                 const Walk& walk) {
  const Operands operands = attention_sliced::queries_and_keys(p, walk.batch, walk.head);
  attention_sliced::copy_slice<C>(slice, operands, walk.place(), p.shape, 0);
}

// sum += dscore of the tile of `walk`, whose first slice is on its way into slices[own]. Leaves
// walk at the next tile, and that one's first slice on its way.
template <class Element>
__device__ __forceinline__ void add_dscore(Product& sum, const AttentionDbiasParams& p,
                                           SharedStorage& smem, int& own, int row, Walk& walk,
                                           const Walk& first) {
  const AttentionShape& shape = p.shape;
  const TilePlace place = walk.place();
  const Operands dout = dout_and_values(p, walk);
  Product probability;
  attention_sliced::multiply_slices<Element, C>(
      probability, attention_sliced::queries_and_keys(p, walk.batch, walk.head), place, shape,
      smem.slices, own, row,
      [&](C::Slice& slice) { attention_sliced::copy_slice<C>(slice, dout, place, shape, 0); });
  const auto tile = attention_sliced::score_tile<C>(place, shape, row, walk.batch, walk.head);
  const bool edge = attention_sliced::tile_band<C>(place, shape, p.score).edge;
  attention_sliced::finish_probabilities<C>(probability, tile, p.score, edge, p.lse, shape.H);

  Product dp;
  attention_sliced::multiply_slices<Element, C>(dp, dout, place, shape, smem.slices, own, row,
                                                [&](C::Slice& slice) {
                                                  walk.step(p, first);
                                                  walk.skip_hidden(p, first);
                                                  if (!walk.done(p, first))
                                                    copy_first_slice(p, slice, walk);
                                                });
  if (p.dropout.rng != nullptr) {
    const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
    drop(dp, tile, key, p.dropout.threshold);
  }
  float delta[C::kM][2];
  attention_sliced::load_row_values<C>(delta, p.delta, tile, shape.H, 0.0f);
  for_each_value<C::kM, C::kN>([&](int m, int n, int e) {
    const float difference = fmaf(dp[m][n][e], p.dropout.scale, -delta[m][e / 2]);
    sum[m][n][e] = fmaf(probability[m][n][e], difference, sum[m][n][e]);
  });
}

__device__ __forceinline__ void store_value(const AttentionDbiasParams& p, int64_t index,
                                            float value) {
  with_dtype(p.score.bias_dtype, [&](auto dtype) {
    using Type = decltype(dtype);
    RawVector<1> raw;
    const float one[1] = {value};
    narrow<Type::value>(raw, one);
    store_raw<Type::bytes>(address_of<Type::bytes>(p.dbias, index), raw);
  });
}

// Sums over rows, and over keys too where the bias has one: of the lanes that share columns, then
// of the warps. Every thread of the block calls.
__device__ __forceinline__ void store_column_sums(const AttentionDbiasParams& p, const Product& sum,
                                                  int64_t plane, int s_first, ColumnSums& sSums) {
  const int lane = own_lane();
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float pair[2] = {0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
      pair[0] += sum[m][n][0] + sum[m][n][2];
      pair[1] += sum[m][n][1] + sum[m][n][3];
    }
    strided_lanes_sum(pair, 4);
    if (lane < 4) {
      float* sPair = &sSums[warp][n * kMmaColumns + 2 * lane];
      sPair[0] = pair[0], sPair[1] = pair[1];
    }
  }
  __syncthreads();
  if (warp > 0) return;
  float total[kTotalsPerLane];
  float all[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kTotalsPerLane; ++i) {
    total[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < C::kTuning.warps; ++w) {
      total[i] += sSums[w][lane + i * kWarpSize];
    }
    all[0] += total[i];
  }
  if (p.sizes.S == 1) {
    lanes_sum(all, kWarpSize);
    if (lane == 0) store_value(p, plane, all[0]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kTotalsPerLane; ++i) {
    const int s = s_first + lane + i * kWarpSize;
    if (s < p.shape.S) store_value(p, plane * p.sizes.S + s, total[i]);
  }
}

// One sum per row, over keys.
__device__ __forceinline__ void store_row_sums(const AttentionDbiasParams& p, const Product& sum,
                                               int64_t plane, int t_first) {
  const FragmentLane at = fragment_lane(own_lane());
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) total += sum[m][n][2 * half] + sum[m][n][2 * half + 1];
      total = quad_sum(total);
      const int t = t_first + m * kMmaRows + half * 8 + at.row;
      if (at.column == 0 && t < p.shape.T) store_value(p, plane * p.sizes.T + t, total);
    }
  }
}

// fp32: the quad of a row fills sectors by itself where rows are even.
__device__ __forceinline__ void store_floats_of_tile(float* gMatrix, const Product& sum,
                                                     const TilePlace& place,
                                                     const AttentionShape& shape, int row) {
  const FragmentLane at = fragment_lane(own_lane());
  for_each_value<C::kM, C::kN>([&](int m, int n, int e) {
    if (e % 2 == 1) return;
    const int t = place.t + row + m * kMmaRows + e / 2 * 8 + at.row;
    const int s = place.s + n * kMmaColumns + at.column;
    if (t >= shape.T || s >= shape.S) return;
    float* gPair = gMatrix + t * static_cast<int64_t>(shape.S) + s;
    const uint2 pair{__float_as_uint(sum[m][n][e]), __float_as_uint(sum[m][n][e + 1])};
    if (shape.S % 2 == 0) {
      *reinterpret_cast<uint2*>(gPair) = pair;
    } else {
      gPair[0] = sum[m][n][e];
      if (s + 1 < shape.S) gPair[1] = sum[m][n][e + 1];
    }
  });
}

__device__ __forceinline__ void store_tile(const AttentionDbiasParams& p, const Product& sum,
                                           int64_t plane, const TilePlace& place,
                                           C::Slice& free_slice, int row) {
  const int64_t matrix = plane * p.shape.T * p.shape.S;
  if (p.score.bias_dtype == DType::kFloat32) {
    store_floats_of_tile(static_cast<float*>(p.dbias) + matrix, sum, place, p.shape, row);
    return;
  }
  auto* gMatrix = static_cast<uint16_t*>(p.dbias) + matrix;
  if (p.score.bias_dtype == DType::kBFloat16) {
    attention_sliced::store_tile<DType::kBFloat16, C>(gMatrix, sum, 1.0f, place, p.shape,
                                                      free_slice.rows, row);
  } else {
    attention_sliced::store_tile<DType::kFloat16, C>(gMatrix, sum, 1.0f, place, p.shape,
                                                     free_slice.rows, row);
  }
}

template <class Element>
__global__ void __launch_bounds__(C::kThreads, C::kTuning.blocks_per_sm)
    attention_dbias_sm80(AttentionDbiasParams p, int batch_first) {
  auto& smem = dynamic_smem<SharedStorage>();
  const Walk first = first_tile(p, batch_first);
  const int row = static_cast<int>(threadIdx.x / kWarpSize) * C::kTuning.rows_per_warp;
  Product sum;
  fill_zero(sum);
  int own = 0;
  Walk walk = first;
  walk.skip_hidden(p, first);
  if (!walk.done(p, first)) copy_first_slice(p, smem.slices[0], walk);
  while (!walk.done(p, first)) add_dscore<Element>(sum, p, smem, own, row, walk, first);

  const int64_t plane = static_cast<int64_t>(first.batch) * p.sizes.H + first.head;
  const TilePlace place = first.place();
  if (p.sizes.T == 1) {
    store_column_sums(p, sum, plane, place.s, reinterpret_cast<ColumnSums&>(smem.slices[own]));
  } else if (p.sizes.S == 1) {
    store_row_sums(p, sum, plane, place.t + row);
  } else {
    store_tile(p, sum, plane, place, smem.slices[own], row);
  }
}

template <class Element>
Status launch_any(const AttentionDbiasParams& p, Stream stream) {
  const auto tiles = [](int size, int block) { return (int64_t{size} + block - 1) / block; };
  const int64_t t_tiles = tiles(p.sizes.T, C::kBlockT), s_tiles = tiles(p.sizes.S, C::kBlockS);
  return launch_grid(attention_dbias_sm80<Element>, p, t_tiles * s_tiles, p.sizes.H, p.sizes.B,
                     C::kThreads, sizeof(SharedStorage), stream);
}

}  // namespace attention_dbias
}  // namespace fused_lm
