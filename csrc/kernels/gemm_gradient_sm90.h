// The epilogue of a weight's gradient that is accumulated: total += a b^T, in fp32 and rounded
// once.
//
// A total lies in global memory as fp32 or in 16 bits, its rows any even number of elements apart.
// Each lane adds to what it holds, 8 bytes of fp32 at a time: four lanes fill a sector of 32 bytes.
// In ping-pong the way there and back is hidden by the other group's products. Nobody else adds
// there, so the result repeats.
#pragma once

#include "kernels/gemm_epilogue_sm90.h"
#include "kernels/gemm_finish.h"

namespace fused_lm {
namespace gemm {

template <DType kDType, class C>
__device__ __forceinline__ void add_to_total(const Consumer<C>& own, const Sums<C>& sums, int row,
                                             int column) {
  constexpr int kBytes = DTypeConstant<kDType>::bytes;
  const Arguments& args = own.args;
  const int thread = Consumer<C>::thread(), lane = thread % kWarpSize;
  const int own_row = row + thread / kWarpSize * 16 + lane / 4, own_column = column + lane % 4 * 2;
  char* gOwn =
      address_of<kBytes>(args.layer.total.data, own_row * args.layer.total.stride + own_column);
  for_each_pair<C>(args, sums, own_row, own_column, [&](int down, int n, const float* pair) {
    char* gRow = gOwn + down * args.layer.total.stride * kBytes;
    add_pair<kDType>(gRow + n * kFragmentColumns * kBytes, pair[0], pair[1]);
  });
}

struct GradientEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    with_dtype(own.args.layer.total.dtype,
               [&](auto dtype) { add_to_total<decltype(dtype)::value>(own, sums, row, column); });
  }
};

}  // namespace gemm
}  // namespace fused_lm
