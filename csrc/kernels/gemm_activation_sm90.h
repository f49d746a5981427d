// The epilogue of a linear layer with its activation: pre = a b^T + bias, rounded, and kept if a
// backward wants it; out = act(pre).
//
// The activation is of the rounded pre: computed again from what was kept, out has the same bits.
#pragma once

#include "kernels/activation.h"
#include "kernels/gemm_epilogue_sm90.h"

namespace fused_lm {
namespace gemm {

template <class C, class Formula>
__device__ __forceinline__ void activate(Packed<C>& packed, const Formula& formula) {
  constexpr DType kDType = kDTypeOf<typename C::Element>;
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float pre[2];
        widen_pair<kDType>(pre, packed[m][block][i]);
        packed[m][block][i] = narrow_pair<kDType>(formula.value(pre[0]), formula.value(pre[1]));
      }
    }
  }
}

struct ActivationEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const Arguments& args = own.args;
    const bool keeps_pre = args.layer.pre != nullptr;
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      if (args.layer.bias != nullptr) {
        add_bias<C>(sums, args.layer.bias, args.N, slab, column + slab * kSlabColumns);
      }
      Packed<C> packed;
      pack<C>(packed, sums, slab);
      if (keeps_pre) own.send(args.pre, packed, 0, row, column + slab * kSlabColumns);
      if (args.layer.activation != Activation::kNone) {
        with_activation(args.layer.activation,
                        [&](const auto& formula) { activate<C>(packed, formula); });
      }
      own.send(args.out, packed, keeps_pre ? 1 : slab % C::kPlaces, row,
               column + slab * kSlabColumns);
    }
    if constexpr (C::kSlabs % C::kPlaces != 0) {
      if (!keeps_pre) own.wait_for_slabs();
    }
  }
};

}  // namespace gemm
}  // namespace fused_lm
