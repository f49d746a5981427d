// Back through an activation, 8 columns of a row: 16 bytes of each matrix.
#pragma once

#include "common/philox.h"
#include "common/types.h"
#include "common/vec.h"
#include "kernels/activation.h"

namespace fused_lm {

constexpr int kActivationVector = 8;
using ActivationRow = float[kActivationVector];

// Reads once what nobody else reads.
template <DType kDType>
__device__ __forceinline__ void load_activation_row(ActivationRow& value, const uint16_t* gRow) {
  RawVector<kActivationVector> raw;
  load_raw<2, LoadPolicy::kStreaming>(raw, reinterpret_cast<const char*>(gRow));
  widen<kDType>(value, raw);
}

template <DType kDType>
__device__ __forceinline__ void store_activation_row(uint16_t* gRow, const ActivationRow& value) {
  RawVector<kActivationVector> raw;
  narrow<kDType>(raw, value);
  store_raw<2>(reinterpret_cast<char*>(gRow), raw);
}

// Times 0 or scale, by dropout; a multiple of 8 columns from `column` on, of batch and head 0.
__device__ __forceinline__ void drop_row(ActivationRow& value, const DropoutParams& dropout,
                                         int64_t row, int64_t column) {
  static_assert(kActivationVector == kPhiloxLanes);
  const DropoutKey key = dropout_key(dropout.rng, 0, 0);
  ActivationRow factor;
  keep_factors(factor, dropout_words(key, row, column / kPhiloxLanes), 0, dropout.threshold,
               dropout.scale);
#pragma unroll
  for (int e = 0; e < kActivationVector; ++e) value[e] = __fmul_rn(value[e], factor[e]);
}

// dout becomes dpre = dout act'(pre), which is stored, rounded.
template <DType kDType>
__device__ __forceinline__ void activation_back(ActivationRow& dout, Activation activation,
                                                const uint16_t* gPre, uint16_t* gDpre) {
  ActivationRow pre;
  load_activation_row<kDType>(pre, gPre);
  with_activation(activation, [&](const auto& formula) {
#pragma unroll
    for (int e = 0; e < kActivationVector; ++e) dout[e] *= formula.slope(pre[e]);
  });
  store_activation_row<kDType>(gDpre, dout);
}

// The first of `parts`, dout, becomes dgate = dout value act'(gate), the second dvalue = dout
// act(gate). Values and what comes of them lie N elements behind the gates.
template <DType kDType>
__device__ __forceinline__ void gated_back(ActivationRow (&parts)[2], Activation activation,
                                           const uint16_t* gPre, uint16_t* gDpre, int64_t N) {
  ActivationRow gate, value;
  load_activation_row<kDType>(gate, gPre);
  load_activation_row<kDType>(value, gPre + N);
  with_activation(activation, [&](const auto& formula) {
#pragma unroll
    for (int e = 0; e < kActivationVector; ++e) {
      const float dout = parts[0][e];
      parts[0][e] = dout * value[e] * formula.slope(gate[e]);
      parts[1][e] = dout * formula.value(gate[e]);
    }
  });
  store_activation_row<kDType>(gDpre, parts[0]);
  store_activation_row<kDType>(gDpre + N, parts[1]);
}

}  // namespace fused_lm
