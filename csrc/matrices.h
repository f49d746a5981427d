// Matrices of 16-bit elements as the products of Hopper take them: lines of adjacent elements that
// start at multiples of 16 bytes, along rows or along columns.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "kernels/gemm.h"
#include "tensors.h"

namespace fused_lm {

// Whether lines along `dim` are what TMA copies. Of a single line the stride says nothing; of an
// expanded one it is 0, which a tensor map doesn't know.
inline bool has_aligned_lines(const Tensor& t, int64_t dim) {
  const int64_t other = 1 - dim, adjacent = t.size(dim) == 1 ? 1 : t.stride(dim);
  const bool apart =
      t.size(other) == 1 || (t.stride(other) % kGemmStep == 0 && t.stride(other) >= t.size(dim));
  return adjacent == 1 && apart && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// An operand and the tensor that holds it.
struct Matrix {
  Tensor held;
  GemmOperand operand;
};

inline Matrix lines_along(const Tensor& t, int64_t dim) {
  const int64_t other = 1 - dim;
  const int64_t stride = t.size(other) == 1 ? t.size(dim) : t.stride(other);
  return {t, {static_cast<const uint16_t*>(t.const_data_ptr()), stride, dim == 0}};
}

// [rows, K], the tensor's own memory or one copy of it; rows adjacent only where `may_be_turned`.
inline Matrix matrix_of(const Tensor& t, bool may_be_turned) {
  if (has_aligned_lines(t, 1)) return lines_along(t, 1);
  if (may_be_turned && has_aligned_lines(t, 0)) return lines_along(t, 0);
  const Tensor packed = torch::stable::contiguous(t);
  return lines_along(has_aligned_lines(packed, 1) ? packed : torch::stable::clone(packed), 1);
}

inline Tensor turned(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

}  // namespace fused_lm
