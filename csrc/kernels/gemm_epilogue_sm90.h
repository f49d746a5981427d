// What the epilogues of Hopper's matrix product share: the bias, and a slab of sums in 16 bits.
//
// An epilogue is a functor: epilogue(consumer, sums, row, column) of a consumer's rows of a tile.
// It goes through them a slab of 64 columns at a time.
#pragma once

#include "kernels/gemm_consumer_sm90.h"

namespace fused_lm {
namespace gemm {

// Adds bias[column], of N, to the sums of a slab that begins at `column`. A lane has two columns of
// each 8.
template <class C>
__device__ __forceinline__ void add_bias(Sums<C>& sums, const uint16_t* gBias, int N, int slab,
                                         int column) {
  const int first = column + ptx::lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kSlabFragments; ++n) {
    const int at = first + n * kFragmentColumns;
    const uint32_t word = at < N ? *reinterpret_cast<const uint32_t*>(gBias + at) : 0u;
    float bias[2];
    widen_pair<kDTypeOf<typename C::Element>>(bias, word);
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int e = 0; e < kFragment; ++e) sums[m][slab * kSlabFragments + n][e] += bias[e % 2];
    }
  }
}

// Calls body(rows further down, number of the fragment, two adjacent sums) for all that a lane has
// inside of the matrix; row and column: where its first ones belong. The second half of a gated
// tile belongs to the same columns as the first.
template <class C, class Body>
__device__ __forceinline__ void for_each_pair(const Arguments& args, const Sums<C>& sums, int row,
                                              int column, const Body& body) {
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = m * kProductRows + half * 8;
      if (row + down >= args.M) continue;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        const bool second = C::kHalves && n >= C::kN / 2;
        const int at = column + n * kFragmentColumns;
        if (at + (second ? args.tile_columns - C::kBlockN : 0) >= args.N) continue;
        body(down, n, &sums[m][n][2 * half]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void pack(Packed<C>& packed, const Sums<C>& sums, int slab) {
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& fragment = sums[m][slab * kSlabFragments + 2 * block + i / 2];
        packed[m][block][i] = narrow_pair<kDTypeOf<typename C::Element>>(fragment[i % 2 * 2],
                                                                         fragment[i % 2 * 2 + 1]);
      }
    }
  }
}

}  // namespace gemm
}  // namespace fused_lm
