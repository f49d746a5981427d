// Packed sequences as operators are given them, [N, H, D] and bounds: checks, and what kernels are
// told.
#pragma once

#include <algorithm>

#include "heads.h"
#include "kernels/attention_varlen.h"

namespace fused_lm {

inline void check_packed(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "attention_varlen takes tensors of three dims");
  check_device(k, q, "k");
  check_device(v, q, "v");
  check_dtype(k, q.scalar_type(), "k");
  check_dtype(v, q.scalar_type(), "v");
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1),
                  "v must have the rows and the heads of k");
  STD_TORCH_CHECK(k.size(2) == q.size(2), "q and k must share D");
  const int64_t H = q.size(1), heads = k.size(1);
  STD_TORCH_CHECK(heads > 0 && H % heads == 0 && H <= kMaxHeads,
                  "the heads of k must divide the heads of q, ", kMaxHeads, " at most");
  for (const int64_t dim : {q.size(2), v.size(2)}) {
    STD_TORCH_CHECK(dim >= 1 && dim <= kMaxHeadDim && dim % kHeadDimStep == 0,
                    "head dims must be multiples of ", kHeadDimStep, " up to ", kMaxHeadDim,
                    ", got ", dim);
  }
  STD_TORCH_CHECK(q.size(0) <= kMaxVarlenRows && k.size(0) <= kMaxVarlenRows,
                  "attention_varlen takes fewer than 2^29 rows");
}

// How many sequences both name.
inline int64_t check_bounds(const Tensor& bounds_q, const Tensor& bounds_k, const Tensor& q) {
  for (const Tensor& bounds : {bounds_q, bounds_k}) {
    check_device(bounds, q, "cu_seqlens");
    const ScalarType dtype = bounds.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                    "cu_seqlens must be int32 or int64, got ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(bounds.dim() == 1 && bounds.size(0) == bounds_q.size(0) && bounds.size(0) > 0,
                    "cu_seqlens must be [sequences + 1], of as many for q as for k");
  }
  const int64_t sequences = bounds_q.size(0) - 1;
  STD_TORCH_CHECK(sequences > 0 || q.size(0) == 0, "queries must be of a sequence");
  constexpr int64_t kMostTiles = INT32_MAX / 2;
  const int64_t tiles = varlen_tiles(q.size(0), sequences, kSmallestVarlenTile);
  STD_TORCH_CHECK(tiles <= kMostTiles / std::max<int64_t>(q.size(1), 1),
                  "attention_varlen takes up to 2^30 tiles of 128 queries, a sequence and a head");
  return sequences;
}

// Of a dim of one element the tensor's own stride says nothing.
inline HeadStrides packed_strides(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? int64_t{0} : t.stride(dim); };
  return {0, stride(1), stride(0)};
}

// The tensor, or one copy where a tensor map can't describe it.
inline Tensor mapped(const Tensor& t) {
  const auto fits = [](const Tensor& rows) {
    const HeadStrides strides = packed_strides(rows);
    return rows.stride(2) == 1 && strides.head % kHeadDimStep == 0 &&
           strides.row % kHeadDimStep == 0 &&
           reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
           maps_heads(strides, 1, static_cast<int>(rows.size(1)), static_cast<int>(rows.size(0)));
  };
  if (fits(t)) return t;
  const Tensor packed = torch::stable::contiguous(t);
  return fits(packed) ? packed : torch::stable::clone(packed);
}

inline SequenceBounds sequence_bounds(const Tensor& bounds, int64_t rows) {
  return {bounds.const_data_ptr(), bounds.scalar_type() == ScalarType::Long,
          static_cast<int>(rows)};
}

inline int varlen_bound(std::optional<int64_t> bound, int absent) {
  return static_cast<int>(std::clamp<int64_t>(bound.value_or(absent), -int64_t{kMaxVarlenRows},
                                              int64_t{kMaxVarlenRows}));
}

}  // namespace fused_lm
