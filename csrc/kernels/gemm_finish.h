// What a thread does with 8 adjacent sums of a product, where no copy engine stores them: a layer's
// end, for tiles in parts (gemm_parts_sm90.h) and for GPUs before Hopper (gemm_sm80.h).
//
// A finish is told where the sums belong, and leaves in them what is summed over rows, if anything
// is: kReads times 8 sums, and kSums; two of them are gates and their values. What it stores is
// what the epilogues of gemm_sm90.h store, rounding for rounding.
#pragma once

#include "common/vec.h"
#include "kernels/activation_row.h"
#include "kernels/gemm_order.h"

namespace fused_lm {
namespace gemm {

constexpr int kFinishColumns = kActivationVector;
using FinishSums = ActivationRow;

// What a finish is given and leaves.
template <class Finish>
using FinishParts = FinishSums[Finish::kReads > Finish::kSums ? Finish::kReads : Finish::kSums];

// total = from + two sums, in fp32 and rounded once.
template <DType kDType>
__device__ __forceinline__ void add_pair(char* gTotal, const char* gFrom, float first,
                                         float second) {
  if constexpr (kDType == DType::kFloat32) {
    const uint2 old = *reinterpret_cast<const uint2*>(gFrom);
    uint2 sum;
    sum.x = __float_as_uint(__uint_as_float(old.x) + first);
    sum.y = __float_as_uint(__uint_as_float(old.y) + second);
    *reinterpret_cast<uint2*>(gTotal) = sum;
  } else {
    float old[2];
    widen_pair<kDType>(old, *reinterpret_cast<const uint32_t*>(gFrom));
    *reinterpret_cast<uint32_t*>(gTotal) = narrow_pair<kDType>(old[0] + first, old[1] + second);
  }
}

// Of 8 sums.
__device__ __forceinline__ void add_row(const GemmTotal& total, const void* from,
                                        const FinishSums& value, int row, int column) {
  with_dtype(total.dtype, [&](auto dtype) {
    constexpr int kBytes = decltype(dtype)::bytes;
    const int64_t at = row * total.stride + column;
    char* gOwn = address_of<kBytes>(total.data, at);
    const char* gFrom = address_of<kBytes>(from, at);
#pragma unroll
    for (int e = 0; e < kFinishColumns; e += 2) {
      add_pair<decltype(dtype)::value>(gOwn + e * kBytes, gFrom + e * kBytes, value[e],
                                       value[e + 1]);
    }
  });
}

template <DType kDType>
__device__ __forceinline__ void add_bias_row(FinishSums& value, const uint16_t* gBias) {
  if (gBias == nullptr) return;
#pragma unroll
  for (int e = 0; e < kFinishColumns; e += 2) {
    float bias[2];
    widen_pair<kDType>(bias, *reinterpret_cast<const uint32_t*>(gBias + e));
    value[e] += bias[0], value[e + 1] += bias[1];
  }
}

// Sums and bias, rounded, and kept if there is a place.
template <DType kDType>
__device__ __forceinline__ void finish_pre(RawVector<kFinishColumns>& raw, FinishSums& value,
                                           const uint16_t* gBias, uint16_t* gPre) {
  add_bias_row<kDType>(value, gBias);
  narrow<kDType>(raw, value);
  if (gPre != nullptr) store_raw<2>(reinterpret_cast<char*>(gPre), raw);
}

template <class T>
__device__ __forceinline__ T* after(T* pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
}

// pre = sums + bias, rounded, and kept if a backward wants it; out = act(pre), or pre.
template <DType kDType>
struct FinishActivation {
  static constexpr int kReads = 1, kSums = 0;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[1],
                                             int row, int column, int N) {
    FinishSums& value = parts[0];
    const int64_t at = int64_t{row} * N + column;
    RawVector<kFinishColumns> raw;
    finish_pre<kDType>(raw, value, after(layer.bias, column), after(layer.pre, at));
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

// The same of gates and values; out = act(gate) value.
template <DType kDType>
struct FinishGated {
  static constexpr int kReads = 2, kSums = 0;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[2],
                                             int row, int column, int N) {
    const int64_t at = 2 * int64_t{row} * N + column;
    RawVector<kFinishColumns> raw;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      finish_pre<kDType>(raw, parts[part], after(layer.bias, part * N + column),
                         after(layer.pre, at + part * N));
      widen<kDType>(parts[part], raw);
    }
    with_activation(layer.activation, [&](const auto& formula) {
#pragma unroll
      for (int e = 0; e < kFinishColumns; ++e)
        parts[0][e] = formula.value(parts[0][e]) * parts[1][e];
    });
    narrow<kDType>(raw, parts[0]);
    store_raw<2>(address_of<2>(layer.out, int64_t{row} * N + column), raw);
  }
};

// total += sums.
template <DType>
struct FinishGradient {
  static constexpr int kReads = 1, kSums = 0;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[1],
                                             int row, int column, int) {
    add_row(layer.total, layer.total.data, parts[0], row, column);
  }
};

// total = residual + dropout(sums + bias).
template <DType kDType>
struct FinishResidual {
  static constexpr int kReads = 1, kSums = 0;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[1],
                                             int row, int column, int) {
    add_bias_row<kDType>(parts[0], after(layer.bias, column));
    if (layer.dropout.rng != nullptr) {
      drop_row(parts[0], layer.dropout, row, column);
    }
    add_row(layer.total, layer.total.residual, parts[0], row, column);
  }
};

// out = sums act'(source), which are summed over the rows of a tile too.
template <DType kDType>
struct FinishActivationBackward {
  static constexpr int kReads = 1, kSums = 1;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[1],
                                             int row, int column, int N) {
    const int64_t at = int64_t{row} * N + column;
    activation_back<kDType>(parts[0], layer.activation, layer.source + at, layer.out + at);
  }
};

// The gradients of gates and values, and both for the sums over rows.
template <DType kDType>
struct FinishGatedBackward {
  static constexpr int kReads = 1, kSums = 2;

  static __device__ __forceinline__ void row(const GemmLayer& layer, FinishSums (&parts)[2],
                                             int row, int column, int N) {
    const int64_t at = 2 * int64_t{row} * N + column;
    gated_back<kDType>(parts, layer.activation, layer.source + at, layer.out + at, N);
  }
};

}  // namespace gemm
}  // namespace fused_lm
