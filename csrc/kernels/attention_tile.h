// What every attention kernel shares: how a block finds its tile, which tiles of the other axis its
// band meets, and products of fragments.
#pragma once

#include <type_traits>

#include "common/shared_tile.h"
#include "common/vec.h"
#include "common/warp.h"
#include "kernels/attention.h"
#include "kernels/attention_tuning.h"
#include "ptx/launch.h"
#include "ptx/mma.h"

namespace fused_lm {

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;
constexpr int kMmaDepth = 16;
constexpr int kFragment = 4;  // fp32 of a [16, 8] product that a thread holds
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNoScore = -INFINITY;

template <class Element>
constexpr DType kDTypeOf = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;

// Where a lane's values of a [16, 8] product lie: (row, column + {0, 1}), then 8 rows below.
struct FragmentLane {
  int row;     // 0 .. 7
  int column;  // 0, 2, 4, 6
};

__device__ __forceinline__ FragmentLane fragment_lane(int lane) { return {lane / 4, lane % 4 * 2}; }

// What a block works on: its tile along one axis, its head and its batch.
struct BlockTile {
  int tile;
  int head;
  int batch;
};

// Of a grid (tiles, heads, batches): blocks that run together share k and v in the L2. `reversed`
// hands out the last tiles first: under a causal mask they are the longest.
__device__ __forceinline__ BlockTile block_tile(bool reversed, int batch_first) {
  const unsigned tile = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return {static_cast<int>(tile), static_cast<int>(blockIdx.y),
          static_cast<int>(blockIdx.z) + batch_first};
}

__device__ __forceinline__ int64_t head_offset(const HeadStrides& strides, int batch, int head) {
  return batch * strides.batch + head * strides.head;
}

// The tiles of the other axis that some positions see.
struct BandTiles {
  int begin;       // first position that any sees, a multiple of the tile
  int full_begin;  // whole tiles that all of them see completely
  int full_end;
  int count;  // tiles in all

  // Where tile i begins, and whether the band may end in it.
  template <int kBlock>
  __device__ __forceinline__ int start(int i) const {
    return begin + i * kBlock;
  }
  __device__ __forceinline__ bool edge(int start) const {
    return start < full_begin || start >= full_end;
  }
};

// Of 0 .. length, positions first .. last see p + lower .. p + upper. A band that begins behind the
// last position may get the ragged tile before it, which masks hide whole.
template <int kBlock>
__device__ __forceinline__ BandTiles band_tiles(int first, int last, int length, int lower,
                                                int upper) {
  const int begin = max(first + lower, 0) / kBlock * kBlock;
  const int end = min(max(last + upper + 1, 0), length);
  const int tiles = max(end - begin + kBlock - 1, 0) / kBlock;
  int full_begin = (max(last + lower, 0) + kBlock - 1) / kBlock * kBlock;
  full_begin = min(full_begin, begin + tiles * kBlock);
  const int whole = min(max(first + upper + 1, 0), length) / kBlock * kBlock;
  const int full_end = max(full_begin, whole);
  return {begin, full_begin, full_end, tiles};
}

// The A operand whose columns are those of two adjacent products: what P is to P v.
template <class Element>
__device__ __forceinline__ void pack_a(uint32_t (&a)[4], const float (&left)[kFragment],
                                       const float (&right)[kFragment]) {
  constexpr DType kDType = kDTypeOf<Element>;
  a[0] = narrow_pair<kDType>(left[0], left[1]);
  a[1] = narrow_pair<kDType>(left[2], left[3]);
  a[2] = narrow_pair<kDType>(right[0], right[1]);
  a[3] = narrow_pair<kDType>(right[2], right[3]);
}

template <int kM, int kN>
__device__ __forceinline__ void fill_zero(float (&value)[kM][kN][kFragment]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < kFragment; ++e) value[m][n][e] = 0.0f;
    }
  }
}

// Adds a [16 kM, 16] times b [16, 16] to columns 16 pair .. of a product.
template <class Element, int kM, int kN>
__device__ __forceinline__ void multiply_pair(float (&product)[kM][kN][kFragment],
                                              const uint32_t (&a)[kM][4], const OperandPair& b,
                                              int pair) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    ptx::mma_m16n8k16(product[m][2 * pair], a[m], b.first, Element{});
    ptx::mma_m16n8k16(product[m][2 * pair + 1], a[m], b.second, Element{});
  }
}

// The largest of a row's values, which lie in four lanes.
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Writes 16 kM rows of sums, scaled and rounded, to rows `row` .. of sRows. Of the tile's columns
// the sums are 16 of every 16 kTeam, from 16 part on: all of them where kTeam is 1.
template <DType kDType, int kTeam, int kM, int kSums, class Tile, class Factor>
__device__ __forceinline__ void stage_sums(const float (&sum)[kM][kSums][kFragment],
                                           const Factor& factor, Tile& sRows, int row, int part) {
  const FragmentLane at = fragment_lane(own_lane());
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own_row = row + m * kMmaRows + half * 8 + at.row;
      const float f = factor(m, half);
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
        const uint32_t pair =
            narrow_pair<kDType>(sum[m][n][2 * half] * f, sum[m][n][2 * half + 1] * f);
        const int chunk = n / 2 * 2 * kTeam + 2 * part + n % 2;
        reinterpret_cast<uint32_t*>(sRows.at(own_row, chunk))[at.column / 2] = pair;
      }
    }
  }
}

// A warp writes rows `row` .. of sRows to rows `first` .. of gHead [length, columns].
template <int kRows, class Tile>
__device__ __forceinline__ void store_tile_rows(uint16_t* gHead, int64_t stride, int first,
                                                int length, int columns, Tile& sRows, int row) {
  using Chunks = ChunksOf<SharedTile<kRows, Tile::kColumns>, kWarpSize>;
  const Chunks own(static_cast<unsigned>(own_lane()));
#pragma unroll
  for (int i = own.row; i < kRows; i += Chunks::kRowsAtOnce) {
#pragma unroll
    for (int chunk = own.chunk; chunk < Tile::kChunks; chunk += Chunks::kLanes) {
      if (first + i >= length || chunk * kChunkElements >= columns) continue;
      uint16_t* gChunk = gHead + (first + i) * stride + chunk * kChunkElements;
      *reinterpret_cast<uint4*>(gChunk) = *sRows.at(row + i, chunk);
    }
  }
}

// Writes 16 kM rows of sums, scaled and rounded, to rows `first` .. of gHead [length, columns].
// They go through sRows, rows `row` .. of which are this warp's own, so that global memory sees
// whole ones.
template <class Element, int kM, int kSums, class Tile, class Factor>
__device__ __forceinline__ void store_sums(uint16_t* gHead, int64_t stride, int first, int length,
                                           int columns, const float (&sum)[kM][kSums][kFragment],
                                           const Factor& factor, Tile& sRows, int row) {
  static_assert(Tile::kChunks == kSums);
  stage_sums<kDTypeOf<Element>, 1>(sum, factor, sRows, row, 0);
  __syncwarp();
  store_tile_rows<kM * kMmaRows>(gHead, stride, first, length, columns, sRows, row);
}

// Launches kernel(p, batch_first) on a grid (tiles, heads, batches).
template <class Params>
Status launch_grid(void (*kernel)(Params, int), const Params& p, int64_t tiles, int heads,
                   int batches, int threads, size_t smem_bytes, Stream stream) {
  for (int64_t first = 0; first < batches; first += kMaxGridBatches) {
    const int64_t left = batches - first;
    const int64_t count = left < kMaxGridBatches ? left : kMaxGridBatches;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(heads),
                    static_cast<unsigned>(count));
    const Status status =
        launch(kernel, {grid, dim3(static_cast<unsigned>(threads)), smem_bytes, stream}, p,
               static_cast<int>(first));
    if (status != kOk) return status;
  }
  return kOk;
}

// The same for all batches of an attention.
template <class Params>
Status launch_heads(void (*kernel)(Params, int), const Params& p, int64_t tiles, int heads,
                    int threads, size_t smem_bytes, Stream stream) {
  return launch_grid(kernel, p, tiles, heads, p.shape.B, threads, smem_bytes, stream);
}

// Calls body with the compiled head dim that holds D and Dv, as a constant.
template <int kIndex = 0, class Body>
Status with_head_dim(const AttentionShape& shape, const Body& body) {
  constexpr int kD = kHeadDims[kIndex];
  if (shape.D <= kD && shape.Dv <= kD) return body(std::integral_constant<int, kD>{});
  if constexpr (kD < kMaxHeadDim) {
    return with_head_dim<kIndex + 1>(shape, body);
  } else {
    return "an attention has head dims above 256";
  }
}

}  // namespace fused_lm
