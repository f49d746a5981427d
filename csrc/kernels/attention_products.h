// Products of a warp's rows: of two tiles in shared memory, and of registers with one.
#pragma once

#include "kernels/attention_tile.h"

namespace fused_lm {

// product = a b^T for 16 kM rows of a, from `row` on, and the rows of b: q k^T, dout v^T.
template <class Element, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_transposed(float (&product)[kM][kN][kFragment], TileA& sA,
                                                    TileB& sB, int lane, int row) {
  static_assert(TileA::kColumns == TileB::kColumns && TileB::kRows == kN * kMmaColumns);
  fill_zero(product);
#pragma unroll
  for (int step = 0; step < TileA::kColumns / kMmaDepth; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], sA, lane, row, m * kMmaRows, step);
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      const OperandPair b = load_b_transposed(sB, lane, 2 * pair * kMmaColumns, step);
      multiply_pair<Element>(product, a, b, pair);
    }
  }
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
      const OperandPair b = load_b(sB, lane, step * kMmaDepth, pair);
      multiply_pair<Element>(sum, packed, b, pair);
    }
  }
}

}  // namespace fused_lm
