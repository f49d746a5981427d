// What the torch side of every operator does with tensors before it hands out raw pointers. The
// public functions in fused_lm/ops have checked a call in the user's words; what is checked here is
// what a wrong pointer would cost. No CUDA header: this also compiles by plain g++.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "common/types.h"

namespace fused_lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType kernel_dtype(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
}

inline DType kernel_dtype(const Tensor& t, const char* name) {
  return kernel_dtype(t.scalar_type(), name);
}

// Of an absent tensor no element is read, so any will do.
inline DType kernel_dtype(const OptionalTensor& t, const char* name) {
  return t ? kernel_dtype(*t, name) : DType::kFloat32;
}

inline void check_device(const OptionalTensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(!t || t->device() == like.device(), name,
                  " must be on the device of the other tensors");
}

inline void check_rows(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t) return;
  check_device(t, like, name);
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == like.size(0) && t->size(1) == like.size(1), name,
                  " must be [N, C] = [", like.size(0), ", ", like.size(1), "]");
}

inline void check_vector(const OptionalTensor& t, int64_t size, const Tensor& like,
                         const char* name) {
  if (!t) return;
  check_device(t, like, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, name, " must be [", size, "]");
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_rng(const OptionalTensor& rng, const Tensor& like) {
  check_vector(rng, 4, like, "rng");
  if (rng) check_dtype(*rng, ScalarType::Long, "rng");
}

// The tensor, or one contiguous copy where its columns are not adjacent.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline OptionalTensor rows_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(rows_contiguous(*t)) : std::nullopt;
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class Element = void>
const Element* data_or_null(const OptionalTensor& t) {
  return t ? static_cast<const Element*>(t->const_data_ptr()) : nullptr;
}

template <class Element = void>
Element* mutable_data_or_null(const OptionalTensor& t) {
  return t ? static_cast<Element*>(t->mutable_data_ptr()) : nullptr;
}

// Elements between rows; of a single row the tensor's own stride says nothing.
inline int64_t row_stride(const OptionalTensor& t) {
  if (!t) return 0;
  return t->size(0) == 1 ? t->size(1) : t->stride(0);
}

inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t size[] = {rows, columns};
  return torch::stable::new_empty(like, {size, 2}, dtype);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {&size, 1}, dtype);
}

// fused_lm/reference/philox.py: a lane is dropped when its 16-bit value is below the threshold.
constexpr double kDropoutLanes = 65536.0;

inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::nearbyint(p * kDropoutLanes));
}

// What kept values are multiplied by; 0 when everything is dropped.
inline float dropout_scale(double p) {
  const double dropped = dropout_threshold(p) / kDropoutLanes;
  return dropped >= 1.0 ? 0.0F : static_cast<float>(1.0 / (1.0 - dropped));
}

inline DropoutParams dropout_params(const OptionalTensor& rng, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout_p must be between 0 and 1, got ", p);
  if (!rng) return {nullptr, 0, 1.0F};
  return {data_or_null<int64_t>(rng), dropout_threshold(p), dropout_scale(p)};
}

inline void raise_if_failed(Status status) { STD_TORCH_CHECK(status == kOk, status); }

}  // namespace fused_lm
