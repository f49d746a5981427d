// What a thread does with 8 adjacent sums of a product, where no copy engine stores them: a layer's
// end, for tiles in parts (gemm_parts_sm90.h) and for GPUs before Hopper (gemm_sm80.h).
//
// A finish is told where the sums belong, and leaves in them what is summed over rows, if anything
// is. What it stores is what the epilogues of gemm_sm90.h store, rounding for rounding.
#pragma once

#include "common/vec.h"
#include "kernels/activation.h"
#include "kernels/gemm_order.h"

namespace fused_lm {
namespace gemm {

constexpr int kFinishColumns = 8;  // 16 bytes of results
using FinishSums = float[kFinishColumns];

// Adds two sums to a total, in fp32 and rounded once.
template <DType kDType>
__device__ __forceinline__ void add_pair(char* gPair, float first, float second) {
  if constexpr (kDType == DType::kFloat32) {
    auto* pair = reinterpret_cast<uint2*>(gPair);
    const uint2 old = *pair;
    uint2 sum;
    sum.x = __float_as_uint(__uint_as_float(old.x) + first);
    sum.y = __float_as_uint(__uint_as_float(old.y) + second);
    *pair = sum;
  } else {
    auto* word = reinterpret_cast<uint32_t*>(gPair);
    float old[2];
    widen_pair<kDType>(old, *word);
    *word = narrow_pair<kDType>(old[0] + first, old[1] + second);
  }
}

// pre = sums + bias, rounded, and kept if a backward wants it; out = act(pre), or pre.
template <DType kDType>
struct FinishActivation {
  static constexpr bool kSumsColumns = false;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums& value, int64_t at,
                                             int, int column) {
    if (layer.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < kFinishColumns; e += 2) {
        float bias[2];
        widen_pair<kDType>(bias, *reinterpret_cast<const uint32_t*>(layer.bias + column + e));
        value[e] += bias[0], value[e + 1] += bias[1];
      }
    }
    RawVector<kFinishColumns> raw;
    narrow<kDType>(raw, value);
    if (layer.pre != nullptr) store_raw<2>(address_of<2>(layer.pre, at), raw);
    if (layer.activation != Activation::kNone) {
      widen<kDType>(value, raw);
      with_activation(layer.activation, [&](const auto& formula) {
#pragma unroll
        for (int e = 0; e < kFinishColumns; ++e) value[e] = formula.value(value[e]);
      });
      narrow<kDType>(raw, value);
    }
    store_raw<2>(address_of<2>(layer.out, at), raw);
  }
};

// total += sums.
template <DType>
struct FinishGradient {
  static constexpr bool kSumsColumns = false;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums& value, int64_t,
                                             int row, int column) {
    with_dtype(layer.total.dtype, [&](auto dtype) {
      constexpr int kBytes = decltype(dtype)::bytes;
      char* gOwn = address_of<kBytes>(layer.total.data, row * layer.total.stride + column);
#pragma unroll
      for (int e = 0; e < kFinishColumns; e += 2) {
        add_pair<decltype(dtype)::value>(gOwn + e * kBytes, value[e], value[e + 1]);
      }
    });
  }
};

// out = sums act'(source), which are summed over the rows of a tile too.
template <DType kDType>
struct FinishActivationBackward {
  static constexpr bool kSumsColumns = true;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums& value, int64_t at,
                                             int, int) {
    RawVector<kFinishColumns> raw;
    load_raw<2, LoadPolicy::kStreaming>(raw, address_of<2>(layer.source, at));
    float pre[kFinishColumns];
    widen<kDType>(pre, raw);
    with_activation(layer.activation, [&](const auto& formula) {
#pragma unroll
      for (int e = 0; e < kFinishColumns; ++e) value[e] *= formula.slope(pre[e]);
    });
    narrow<kDType>(raw, value);
    store_raw<2>(address_of<2>(layer.out, at), raw);
  }
};

}  // namespace gemm
}  // namespace fused_lm
