// The epilogue of a gated layer: gate and value = a b^T + bias, rounded, and kept if a backward
// wants them; out = act(gate) value.
//
// The first half of a tile's columns are gates, the second their values: of one column both are in
// the same lane. Both are rounded first, as in gemm_activation_sm90.h.
#pragma once

#include "kernels/activation.h"
#include "kernels/gemm_epilogue_sm90.h"

namespace fused_lm {
namespace gemm {

// Leaves act(gate) value in the gates.
template <class C, class Formula>
__device__ __forceinline__ void activate_gated(Packed<C>& gates, const Packed<C>& values,
                                               const Formula& formula) {
  constexpr DType kDType = kDTypeOf<typename C::Element>;
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float gate[2], value[2];
        widen_pair<kDType>(gate, gates[m][block][i]);
        widen_pair<kDType>(value, values[m][block][i]);
        gates[m][block][i] = narrow_pair<kDType>(formula.value(gate[0]) * value[0],
                                                 formula.value(gate[1]) * value[1]);
      }
    }
  }
}

struct GatedEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    static_assert(C::kHalves && C::kPlaces == 2);
    const Arguments& args = own.args;
    const bool keeps_pre = args.layer.pre != nullptr;
    constexpr int kHalf = C::kSlabs / 2;
    static_assert(kHalf % 2 == 0, "the next tile begins in the other place than this one ends in");
#pragma unroll
    for (int slab = 0; slab < kHalf; ++slab) {
      const int first = column + slab * kSlabColumns, place = slab % 2;
      if (args.layer.bias != nullptr) {
        add_bias<C>(sums, args.layer.bias, args.N, slab, first);
        add_bias<C>(sums, args.layer.bias + args.N, args.N, kHalf + slab, first);
      }
      Packed<C> gates, values;
      pack<C>(gates, sums, slab);
      pack<C>(values, sums, kHalf + slab);
      if (keeps_pre) {
        own.send(args.pre, gates, place, row, first);
        own.send(args.pre_values, values, 1 - place, row, first);
      }
      with_activation(args.layer.activation,
                      [&](const auto& formula) { activate_gated<C>(gates, values, formula); });
      own.send(args.out, gates, place, row, first);
    }
  }
};

}  // namespace gemm
}  // namespace fused_lm
