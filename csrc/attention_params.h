// From tensors to what the attention kernels are told: shapes, masks, bias, band.
#pragma once

#include <algorithm>

#include "heads.h"
#include "kernels/attention.h"
#include "tensors.h"

namespace fused_lm {

inline AttentionShape shape_of(const Tensor& q, const Tensor& k, int64_t Dv) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "attention takes [B, H, T, D] tensors");
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const int64_t heads = k.size(1), S = k.size(2);
  check_device(k, q, "k");
  check_dtype(k, q.scalar_type(), "k");
  STD_TORCH_CHECK(k.size(0) == B && k.size(3) == D, "q and k must share B and D");
  STD_TORCH_CHECK(H == heads || (heads > 0 && H % heads == 0),
                  "the heads of k must divide the heads of q");
  for (const int64_t dim : {D, Dv}) {
    STD_TORCH_CHECK(dim >= 1 && dim <= kMaxHeadDim && dim % kHeadDimStep == 0,
                    "head dims must be multiples of ", kHeadDimStep, " up to ", kMaxHeadDim,
                    ", got ", dim);
  }
  STD_TORCH_CHECK(T + S <= kMaxLengths && B < INT32_MAX && H <= kMaxHeads,
                  "attention takes fewer than 2^31 queries and keys, and ", kMaxHeads, " heads");
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  return {narrow(B), narrow(H), narrow(heads > 0 ? H / heads : 1), narrow(T), narrow(S),
          narrow(D), narrow(Dv)};
}

inline void check_values(const Tensor& v, const Tensor& k) {
  STD_TORCH_CHECK(v.dim() == 4, "v must be [B, Hkv, S, Dv]");
  check_device(v, k, "v");
  check_dtype(v, k.scalar_type(), "v");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(v.size(dim) == k.size(dim), "v must have batch, heads and length of k");
  }
}

// One fp32 per row of q: lse, delta.
inline void check_row_values(const Tensor& t, const Tensor& q, const char* name) {
  check_device(t, q, name);
  check_dtype(t, ScalarType::Float, name);
  bool fits = t.dim() == 3;
  for (int64_t dim = 0; fits && dim < 3; ++dim) fits = t.size(dim) == q.size(dim);
  STD_TORCH_CHECK(fits, name, " must be [B, H, T]");
}

// A tensor that broadcasts to [B, H, T, S]; absent ones pass.
inline void check_score(const OptionalTensor& t, const Tensor& like, const AttentionShape& shape,
                        const char* name) {
  if (!t) return;
  check_device(t, like, name);
  const int64_t full[] = {shape.B, shape.H, shape.T, shape.S};
  bool fits = t->dim() == 4;
  for (int64_t dim = 0; fits && dim < 4; ++dim) {
    fits = t->size(dim) == 1 || t->size(dim) == full[dim];
  }
  STD_TORCH_CHECK(fits, name, " must broadcast to [B, H, T, S]");
}

inline ScoreStrides score_strides(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? int64_t{0} : t.stride(dim); };
  return {stride(0), stride(1), stride(2), stride(3)};
}

// Whether `count` elements of every row, from a multiple of it on, are one aligned load.
inline bool rows_of(int64_t count, const Tensor& t, const ScoreStrides& strides, int64_t S,
                    int64_t element_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return strides.col == 1 && S % count == 0 && strides.batch % count == 0 &&
         strides.head % count == 0 && strides.row % count == 0 &&
         address % (count * element_bytes) == 0;
}

// The band in 32 bits: bounds that hide nothing, or everything, as the nearest that do the same.
inline int clamped(std::optional<int64_t> bound, int absent, const AttentionShape& shape) {
  if (!bound) return absent;
  return static_cast<int>(std::clamp<int64_t>(*bound, -int64_t{shape.T}, int64_t{shape.S}));
}

inline ScoreParams score_params(const AttentionShape& shape, const Tensor& like,
                                const OptionalTensor& mask, const OptionalTensor& key_mask,
                                const OptionalTensor& bias, std::optional<int64_t> lower,
                                std::optional<int64_t> upper, double scale, double softcap) {
  ScoreParams score{};
  check_score(mask, like, shape, "mask");
  check_score(bias, like, shape, "bias");
  if (mask) {
    check_dtype(*mask, ScalarType::Bool, "mask");
    score.mask = data_or_null<uint8_t>(mask);
    score.mask_strides = score_strides(*mask);
    score.mask_octets = rows_of(8, *mask, score.mask_strides, shape.S, 1);
  }
  if (key_mask) {
    check_device(key_mask, like, "key_mask");
    check_dtype(*key_mask, ScalarType::Bool, "key_mask");
    STD_TORCH_CHECK(
        key_mask->dim() == 2 && key_mask->size(0) == shape.B && key_mask->size(1) == shape.S,
        "key_mask must be [B, S]");
    score.key_mask = data_or_null<uint8_t>(key_mask);
    score.key_mask_strides = {key_mask->stride(0), 0, 0, key_mask->stride(1)};
  }
  score.bias_dtype = kernel_dtype(bias, "bias");
  if (bias) {
    score.bias = data_or_null(bias);
    score.bias_strides = score_strides(*bias);
    score.bias_pairs = rows_of(2, *bias, score.bias_strides, shape.S, size_of(score.bias_dtype));
  }
  score.lower = clamped(lower, -shape.T, shape);
  score.upper = clamped(upper, shape.S, shape);
  score.scale = static_cast<float>(scale);
  score.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  score.softcap = static_cast<float>(softcap);
  return score;
}

}  // namespace fused_lm
