// The epilogue of a linear layer: out = a b^T + bias, or without.
#pragma once

#include "kernels/gemm_epilogue_sm90.h"

namespace fused_lm {
namespace gemm {

struct LinearEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const Arguments& args = own.args;
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      if (args.layer.bias != nullptr) {
        add_bias<C>(sums, args.layer.bias, args.N, slab, column + slab * kSlabColumns);
      }
      Packed<C> packed;
      pack<C>(packed, sums, slab);
      own.send(args.out, packed, slab % C::kPlaces, row, column + slab * kSlabColumns);
    }
    if constexpr (C::kSlabs % C::kPlaces != 0) own.wait_for_slabs();
  }
};

}  // namespace gemm
}  // namespace fused_lm
