// The epilogue of a weight's gradient that is accumulated: total += a b^T, in fp32 and rounded
// once.
//
// A total lies in global memory as fp32 or in 16 bits, its rows any even number of elements apart.
// Each lane adds to what it holds, 8 bytes of fp32 at a time: four lanes fill a sector of 32 bytes.
// In ping-pong the way there and back is hidden by the other group's products. Nobody else adds
// there, so the result repeats.
#pragma once

#include "kernels/gemm_epilogue_sm90.h"

namespace fused_lm {
namespace gemm {

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

template <DType kDType, class C>
__device__ __forceinline__ void add_to_total(const Consumer<C>& own, const Sums<C>& sums, int row,
                                             int column) {
  constexpr int kBytes = DTypeConstant<kDType>::bytes;
  const Arguments& args = own.args;
  const int thread = Consumer<C>::thread(), lane = thread % kWarpSize;
  const int own_row = row + thread / kWarpSize * 16 + lane / 4, own_column = column + lane % 4 * 2;
  char* gOwn = address_of<kBytes>(args.total.data, own_row * args.total.stride + own_column);
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = m * kProductRows + half * 8;
      if (own_row + down >= args.M) continue;
      char* gRow = gOwn + down * args.total.stride * kBytes;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        if (own_column + n * kFragmentColumns >= args.N) continue;
        add_pair<kDType>(gRow + n * kFragmentColumns * kBytes, sums[m][n][2 * half],
                         sums[m][n][2 * half + 1]);
      }
    }
  }
}

struct GradientEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    with_dtype(own.args.total.dtype,
               [&](auto dtype) { add_to_total<decltype(dtype)::value>(own, sums, row, column); });
  }
};

}  // namespace gemm
}  // namespace fused_lm
