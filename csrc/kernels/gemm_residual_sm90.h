// The epilogue of a linear layer that adds to a residual stream: total = residual + dropout(a b^T +
// bias), in fp32 and rounded once.
//
// What is added and where it goes lie in global memory as fp32 or in 16 bits, as in
// gemm_gradient_sm90.h. A block of 8 columns draws its dropout from one Philox call, but four lanes
// have two of them each: so of four such blocks in a row each lane draws one, and they tell one
// another which columns are kept. That is done before a tile is multiplied, while the other group
// does: beside 192 sums there are no registers for it.
#pragma once

#include "common/philox.h"
#include "kernels/gemm_gradient_sm90.h"

namespace fused_lm {
namespace gemm {

struct ResidualEpilogue {
  static constexpr int kWords = 6;
  uint32_t kept[kWords] = {};  // a bit per sum

  // Draws dropout for a consumer's rows of a tile.
  template <class C>
  __device__ __forceinline__ void draw(const Consumer<C>& own, int row, int column) {
    static_assert(kWords * 32 == C::kM * C::kN * kFragment);
    const DropoutParams& dropout = own.args.layer.dropout;
    if (dropout.rng == nullptr) return;
    const DropoutKey key = dropout_key(dropout.rng, 0, 0);
    const int lane = ptx::lane_index(), quad = lane % kLanes;
    const int own_row = own_first_row<C>(row), block = column / kPhiloxLanes + quad;
#pragma unroll
    for (int i = 0; i < C::kM * 2 * C::kN; i += kLanes) {
      const int down = i / C::kN % 2 * 8 + i / (2 * C::kN) * kProductRows;
      const PhiloxWords words = dropout_words(key, own_row + down, block + i % C::kN);
      const uint32_t mine = keep_bits(words, dropout.threshold);
#pragma unroll
      for (int from = 0; from < kLanes; ++from) {
        const uint32_t bits = __shfl_sync(kAllLanes, mine, lane - quad + from) >> 2 * quad;
        kept[(i + from) / 16] |= (bits & 3u) << (i + from) % 16 * 2;
      }
    }
  }

  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const GemmLayer& layer = own.args.layer;
    if (layer.bias != nullptr) {
#pragma unroll
      for (int slab = 0; slab < C::kSlabs; ++slab) {
        add_bias<C>(sums, layer.bias, own.args.N, slab, column + slab * kSlabColumns);
      }
    }
    if (layer.dropout.rng != nullptr) drop<C>(sums, layer.dropout.scale);
    with_dtype(layer.total.dtype, [&](auto dtype) {
      add_to_total<decltype(dtype)::value>(own, sums, row, column, layer.total.residual);
    });
  }

 private:
  static constexpr int kLanes = 4;  // that share 8 columns

  template <class C>
  __device__ __forceinline__ void drop(Sums<C>& sums, float scale) const {
#pragma unroll
    for (int i = 0; i < C::kM * 2 * C::kN; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& sum = sums[i / (2 * C::kN)][i % C::kN][i / C::kN % 2 * 2 + e];
        const bool keeps = (kept[i / 16] >> (i % 16 * 2 + e) & 1u) != 0;
        sum = __fmul_rn(sum, keeps ? scale : 0.0f);  // a NaN stays one
      }
    }
  }
};

}  // namespace gemm
}  // namespace fused_lm
