// Host twin of csrc/ptx/tensor_map.h: a map that the harness can read.
#pragma once

#include "common/tensor_layout.h"
#include "ptx/builtins.h"

namespace fused_lm {
namespace ptx {

struct alignas(64) TensorMap : ::simt::TensorMap {};

}  // namespace ptx

inline Status encode_tensor_map(ptx::TensorMap& map, const TensorLayout& layout) {
  map.base = static_cast<char*>(const_cast<void*>(layout.base));
  map.element = layout.dtype == DType::kFloat32   ? ::simt::Element::kFloat32
                : layout.dtype == DType::kFloat16 ? ::simt::Element::kFloat16
                                                  : ::simt::Element::kBFloat16;
  map.rank = layout.rank;
  map.swizzle = static_cast<int>(layout.swizzle);
  for (int i = 0; i < kMaxTensorRank; ++i) {
    map.sizes[i] = layout.sizes[i];
    map.strides[i] = layout.strides[i];
    map.box[i] = layout.box[i];
  }
  return ::simt::problem_of(map);
}

}  // namespace fused_lm
