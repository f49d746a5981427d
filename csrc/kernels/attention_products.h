// Products of a warp's rows with tiles in shared memory.
#pragma once

#include "kernels/attention_tile.h"

namespace fused_lm {

// What a warp of a kernel's Config C holds: a tile of scores, and its rows of a result.
template <class C>
using Scores = float[C::kM][C::kScores][kFragment];
template <class C>
using Sums = float[C::kM][C::kSums][kFragment];

// Left operands that are read from shared memory for every product: 16 kM rows from `row` on.
template <class Tile>
struct SharedOperands {
  Tile& sTile;
  int lane, row;

  template <int kM>
  __device__ __forceinline__ void get(uint32_t (&a)[kM][4], int step) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], sTile, lane, row, m * kMmaRows, step);
  }
};

template <class Tile>
__device__ __forceinline__ SharedOperands<Tile> shared_operands(Tile& sTile, int lane, int row) {
  return {sTile, lane, row};
}

// The same, read once and held.
template <int kHeldM, int kSteps>
struct HeldOperands {
  uint32_t held[kSteps][kHeldM][4];

  template <class Tile>
  __device__ __forceinline__ void load(Tile& sTile, int lane, int row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int m = 0; m < kHeldM; ++m) {
        load_a(held[step][m], sTile, lane, row, m * kMmaRows, step);
      }
    }
  }

  __device__ __forceinline__ void get(uint32_t (&a)[kHeldM][4], int step) const {
#pragma unroll
    for (int m = 0; m < kHeldM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[m][r] = held[step][m][r];
    }
  }
};

// product += a b^T over the columns of b, whose rows from `row` on are the product's columns:
// q k^T, dout v^T.
template <class Element, int kM, int kN, class Operands, class Tile>
__device__ __forceinline__ void add_transposed(float (&product)[kM][kN][kFragment],
                                               const Operands& operands, Tile& sB, int lane,
                                               int row = 0) {
  static_assert(Tile::kRows % (kN * kMmaColumns) == 0);
#pragma unroll
  for (int step = 0; step < Tile::kColumns / kMmaDepth; ++step) {
    uint32_t a[kM][4];
    operands.get(a, step);
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      const OperandPair b = load_b_transposed(sB, lane, row, 2 * pair * kMmaColumns, step);
      multiply_pair<Element>(product, a, b, pair);
    }
  }
}

template <class Element, int kM, int kN, class Operands, class Tile>
__device__ __forceinline__ void multiply_transposed(float (&product)[kM][kN][kFragment],
                                                    const Operands& operands, Tile& sB, int lane,
                                                    int row = 0) {
  fill_zero(product);
  add_transposed<Element>(product, operands, sB, lane, row);
}

// sum += a b for a in registers, rounded to b's type, and all rows of b: p v, ds k.
template <class Element, int kM, int kN, int kSums, class Tile>
__device__ __forceinline__ void add_product(float (&sum)[kM][kSums][kFragment],
                                            const float (&a)[kM][kN][kFragment], Tile& sB,
                                            int lane) {
  static_assert(Tile::kRows == kN * kMmaColumns && Tile::kColumns == kSums * kMmaColumns);
#pragma unroll
  for (int step = 0; step < kN / 2; ++step) {
    uint32_t packed[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) pack_a<Element>(packed[m], a[m][2 * step], a[m][2 * step + 1]);
#pragma unroll
    for (int pair = 0; pair < kSums / 2; ++pair) {
      const OperandPair b = load_b(sB, lane, 0, step * kMmaDepth, 0, pair);
      multiply_pair<Element>(sum, packed, b, pair);
    }
  }
}

}  // namespace fused_lm
