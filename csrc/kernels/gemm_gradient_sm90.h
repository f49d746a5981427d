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

// The first of a lane's rows, of a consumer's from `row` on.
template <class C>
__device__ __forceinline__ int own_first_row(int row) {
  const int thread = Consumer<C>::thread();
  return row + thread / kWarpSize * 16 + thread % kWarpSize / 4;
}

// total = from + sums; from may be the total itself.
template <DType kDType, class C>
__device__ __forceinline__ void add_to_total(const Consumer<C>& own, const Sums<C>& sums, int row,
                                             int column, const void* from) {
  constexpr int kBytes = DTypeConstant<kDType>::bytes;
  const Arguments& args = own.args;
  const GemmTotal& total = args.layer.total;
  const int own_row = own_first_row<C>(row);
  const int own_column = column + Consumer<C>::thread() % 4 * 2;
  const int64_t at = own_row * total.stride + own_column;
  char* gOwn = address_of<kBytes>(total.data, at);
  const char* gFrom = address_of<kBytes>(from, at);
  for_each_pair<C>(args, sums, own_row, own_column, [&](int down, int n, const float* pair) {
    const int64_t further = (down * total.stride + n * kFragmentColumns) * kBytes;
    add_pair<kDType>(gOwn + further, gFrom + further, pair[0], pair[1]);
  });
}

struct GradientEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const GemmTotal& total = own.args.layer.total;
    with_dtype(total.dtype, [&](auto dtype) {
      add_to_total<decltype(dtype)::value>(own, sums, row, column, total.data);
    });
  }
};

}  // namespace gemm
}  // namespace fused_lm
