// Tensors of heads, [B, H, T, D], as kernels want them: rows of adjacent columns that start at
// multiples of 16 bytes.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "kernels/attention.h"
#include "tensors.h"

namespace fused_lm {

inline bool is_bf16(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the tensor core kernels take bfloat16 and float16, got ",
                  torch::headeronly::toString(dtype));
  return dtype == ScalarType::BFloat16;
}

inline const uint16_t* halves(const Tensor& t) {
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

inline uint16_t* mutable_halves(const Tensor& t) {
  return static_cast<uint16_t*>(t.mutable_data_ptr());
}

// Of a dim of one element the tensor's own stride says nothing.
inline HeadStrides head_strides(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? int64_t{0} : t.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

inline bool has_aligned_rows(const Tensor& t) {
  const HeadStrides strides = head_strides(t);
  const bool whole = strides.batch % kHeadDimStep == 0 && strides.head % kHeadDimStep == 0 &&
                     strides.row % kHeadDimStep == 0;
  return whole && t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// The tensor, or one copy where its rows lie otherwise.
inline Tensor aligned_heads(const Tensor& t) {
  if (has_aligned_rows(t)) return t;
  const Tensor packed = torch::stable::contiguous(t);
  return has_aligned_rows(packed) ? packed : torch::stable::clone(packed);
}

// Whether [B, H, T, D] lies as [B, T, H, D], the heads of a row side by side.
inline bool rows_first(const Tensor& t) { return t.stride(2) > t.stride(1); }

// Uninitialised [B, H, T, D], dense, in the memory order of `like`: fused_lm/reference/layout.py.
inline Tensor empty_heads(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  const std::array<int64_t, 4> size{B, H, T, D};
  if (!rows_first(like)) return torch::stable::new_empty(like, {size.data(), 4});
  const std::array<int64_t, 4> stride{T * H * D, D, H * D, 1};
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(like),
                                    from(IntHeaderOnlyArrayRef(size.data(), 4)),
                                    from(IntHeaderOnlyArrayRef(stride.data(), 4)),
                                    from(std::optional<ScalarType>()),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional<torch::stable::Device>()),
                                    from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Uninitialised [B, H, T] of one number per row.
inline Tensor empty_like_heads(const Tensor& heads, ScalarType dtype) {
  const std::array<int64_t, 3> size{heads.size(0), heads.size(1), heads.size(2)};
  return torch::stable::new_empty(heads, {size.data(), 3}, dtype);
}

}  // namespace fused_lm
