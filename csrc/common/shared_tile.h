// Tiles of 16-bit rows in shared memory, and what the tensor cores read of them.
//
// A row is chunks of 16 bytes. ldmatrix reads the same chunk of eight rows at once, which would
// fall into the same banks: rows are multiples of 128 bytes, or of 64, long. So chunks are stored
// in another order in every row: chunk ^ (row % 8), or, where a row ends in the middle of the
// banks, chunk ^ (row / 2 % 4). Copies of neighbouring chunks stay free of conflicts too.
#pragma once

#include "common/types.h"
#include "ptx/cp_async.h"
#include "ptx/matrix.h"

namespace fused_lm {

constexpr int kChunkElements = 8;
constexpr int kChunkBytes = 16;
constexpr int kBankChunks = 8;  // 128 bytes

template <int kTileRows, int kTileColumns>
struct SharedTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kChunks = kColumns / kChunkElements;
  static constexpr bool kWholeBanks = kChunks % kBankChunks == 0;
  static constexpr uint32_t kPeriod = kWholeBanks ? kBankChunks : kBankChunks / 2;
  static_assert(kColumns % 32 == 0, "rows of 64 bytes");

  uint4 chunks[kRows][kChunks];

  // The address of a chunk in two parts. The first one knows where the chunk is among kPeriod, the
  // second one, of constants, among how many periods and, in steps of 8, rows further on.
  static __device__ __forceinline__ uint32_t lane_off(int row, int chunk) {
    const uint32_t flip = static_cast<uint32_t>(row) / (kWholeBanks ? 1u : 2u);
    const uint32_t stored = (static_cast<uint32_t>(chunk) ^ flip) % kPeriod;
    return (static_cast<uint32_t>(row) * kChunks + stored) * kChunkBytes;
  }
  static __device__ __forceinline__ constexpr uint32_t fixed_off(int rows, int chunk) {
    return (static_cast<uint32_t>(rows) * kChunks +
            static_cast<uint32_t>(chunk) / kPeriod * kPeriod) *
           kChunkBytes;
  }

  __device__ __forceinline__ uint4* at(int row, int chunk) {
    return &chunks[0][0] + (lane_off(row, chunk) + fixed_off(0, chunk)) / kChunkBytes;
  }
};

// Lanes that share the chunks of one row: as few as take whole banks, more where rows are few.
constexpr int lanes_per_row(int lanes, int rows, int threads) {
  while (threads / lanes > rows) lanes *= 2;
  return lanes;
}

// Who copies what: kLanes neighbours take the chunks of one row, and then those kRowsAtOnce below.
template <class Tile, int kThreads>
struct ChunksOf {
  static constexpr int kLanes = lanes_per_row(Tile::kPeriod, Tile::kRows, kThreads);
  static constexpr int kRowsAtOnce = kThreads / kLanes;
  static_assert(Tile::kRows % kRowsAtOnce == 0 && Tile::kChunks % kLanes == 0,
                "all threads copy alike");

  int row, chunk;  // the first ones

  __device__ __forceinline__ explicit ChunksOf(unsigned thread)
      : row(static_cast<int>(thread / kLanes)), chunk(static_cast<int>(thread % kLanes)) {}
};

// Copies rows first .. of a matrix [length, columns] into a tile, asynchronously; zeros beside it.
// Every thread of the block calls. Rows are aligned to 16 bytes and lie `stride` elements apart.
// kUnroll: rows per thread whose addresses are made at once.
template <int kThreads, int kUnroll, class Tile>
__device__ __forceinline__ void copy_rows_unrolled(Tile& sTile, const uint16_t* gMatrix,
                                                   int64_t stride, int first, int length,
                                                   int columns, unsigned thread) {
  using Chunks = ChunksOf<Tile, kThreads>;
  const Chunks own(thread);
  const uint16_t* gRow = gMatrix + (first + own.row) * stride + own.chunk * kChunkElements;
#pragma unroll kUnroll
  for (int row = 0; row < Tile::kRows; row += Chunks::kRowsAtOnce) {
    const bool in_rows = first + own.row + row < length;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += Chunks::kLanes) {
      const bool inside = in_rows && (own.chunk + chunk) * kChunkElements < columns;
      ptx::cp_async_16(sTile.at(own.row + row, own.chunk + chunk), gRow + chunk * kChunkElements,
                       inside ? kChunkBytes : 0);
    }
    gRow += Chunks::kRowsAtOnce * stride;
  }
}

template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows_async(Tile& sTile, const uint16_t* gMatrix,
                                                int64_t stride, int first, int length, int columns,
                                                unsigned thread = threadIdx.x) {
  copy_rows_unrolled<kThreads, Tile::kRows>(sTile, gMatrix, stride, first, length, columns, thread);
}

__device__ __forceinline__ int own_lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

// An A operand: 16 rows from `row`, `rows` further on, columns 16 step .. 16 step + 15. All are
// multiples of 8; rows and step are constants.
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], Tile& sTile, int lane, int row, int rows,
                                       int step) {
  ptx::ldmatrix_x4(a, &sTile, Tile::lane_off(row + lane % 16, 2 * step + lane / 16),
                   Tile::fixed_off(rows, 2 * step));
}

// Two adjacent B operands of 8 columns each. The registers of one must be neighbours, or the
// compiler moves them there: so ldmatrix fetches them in this order.
struct OperandPair {
  uint32_t first[2];
  uint32_t second[2];
};

// B[k][n] = tile[row + rows + n][16 step + k]: the tile's rows are the product's columns. row is a
// multiple of 8; rows and step are constants.
template <class Tile>
__device__ __forceinline__ OperandPair load_b_transposed(Tile& sTile, int lane, int row, int rows,
                                                         int step) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, &sTile,
                   Tile::lane_off(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2),
                   Tile::fixed_off(rows, 2 * step));
  return {{r[0], r[1]}, {r[2], r[3]}};
}

// B[k][n] = tile[row + rows + k][16 (pair + pairs) + n]: the tile's rows are summed over. pair,
// which is no constant, is below the largest power of 2 that divides pairs.
template <class Tile>
__device__ __forceinline__ OperandPair load_b(Tile& sTile, int lane, int row, int rows, int pair,
                                              int pairs) {
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, &sTile, Tile::lane_off(row + lane % 16, 2 * (pairs + pair) + lane / 16),
                         Tile::fixed_off(rows, 2 * pairs));
  return {{r[0], r[1]}, {r[2], r[3]}};
}

}  // namespace fused_lm
