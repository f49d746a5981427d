// A thread's share of a row: kSlots vectors of kVec adjacent columns, `threads` vectors apart.
#pragma once

#include "common/philox.h"
#include "common/vec.h"
#include "common/warp.h"
#include "kernels/layernorm.h"

namespace fused_lm {

// Where a thread stands. Rows of up to 32 threads lie side by side in a warp.
struct RowThread {
  int row;      // of the block
  int thread;   // of the row
  int threads;  // per row

  // The first column of a slot.
  template <int kVec>
  __device__ __forceinline__ int column(int slot) const {
    return (slot * threads + thread) * kVec;
  }
};

__device__ __forceinline__ RowThread row_thread(int threads_per_row) {
  const int thread = static_cast<int>(threadIdx.x);
  return {thread / threads_per_row, thread % threads_per_row, threads_per_row};
}

// The rows that a thread has in flight, `groups` apart, and how many columns they have.
struct RowTile {
  RowThread at;
  int64_t first_row;
  int groups;
  int64_t N;
  int C;
  float inverse_C;

  __device__ __forceinline__ int64_t row(int j) const { return first_row + j * groups; }
};

// Sums over the threads of each row. Barrier 1 + row of the block is the row's own.
template <int kValues, int kMaxWarps>
__device__ __forceinline__ void row_sum(float (&value)[kValues], float (&sSums)[kValues][kMaxWarps],
                                        const RowThread& at) {
  if (at.threads <= kWarpSize) {
    lanes_sum(value, at.threads);
  } else {
    const int warps = at.threads / kWarpSize;
    warps_sum(value, sSums, at.row * warps, warps, 1 + at.row);
  }
}

template <int kBytes, int kSlots, int kRows, int kVec>
__device__ __forceinline__ void load_rows_of(RawVector<kVec> (&raw)[kSlots][kRows],
                                             const void* base, int64_t stride,
                                             const RowTile& tile) {
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int64_t row = tile.row(j);
    const char* p = address_of<kBytes>(base, row * stride);
    const int C = row < tile.N ? tile.C : 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int column = tile.at.column<kVec>(i);
      if (column < C) load_raw<kBytes, LoadPolicy::kStreaming>(raw[i][j], p + column * kBytes);
    }
  }
}

// Issues the loads of all rows; 0 beyond their N and C.
template <int kSlots, int kRows, int kVec>
__device__ __forceinline__ void load_rows(RawVector<kVec> (&raw)[kSlots][kRows], const void* base,
                                          DType dtype, int64_t stride, const RowTile& tile) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) raw[i][j] = RawVector<kVec>{};
  }
  if constexpr (kVec == 8) {
    load_rows_of<2>(raw, base, stride, tile);
  } else if (dtype == DType::kFloat32) {
    load_rows_of<4>(raw, base, stride, tile);
  } else {
    load_rows_of<2>(raw, base, stride, tile);
  }
}

// A norm is batch 0, head 0.
__device__ __forceinline__ DropoutKey norm_dropout_key(const DropoutParams& dropout) {
  return dropout.rng == nullptr ? DropoutKey{} : dropout_key(dropout.rng, 0, 0);
}

// Columns `column` .. `column + kVec - 1` times 0 or scale.
template <int kVec>
__device__ __forceinline__ void drop(float (&value)[kVec], const DropoutParams& dropout,
                                     const DropoutKey& key, int64_t row, int64_t column) {
  float factor[kVec];
  keep_factors(factor, dropout_words(key, row, column / kPhiloxLanes),
               static_cast<int>(column % kPhiloxLanes), dropout.threshold, dropout.scale);
#pragma unroll
  for (int e = 0; e < kVec; ++e) value[e] *= factor[e];
}

template <int kVec>
__device__ __forceinline__ void widen_vector(float (&value)[kVec], const RawVector<kVec>& raw,
                                             DType dtype) {
  with_dtype(dtype, [&](auto tag) { widen<decltype(tag)::value>(value, raw); });
}

// Stores one vector, and where kRound leaves in `value` what it stored.
template <bool kRound, int kVec>
__device__ __forceinline__ void store_vector(void* base, DType dtype, int64_t index, bool ok,
                                             float (&value)[kVec]) {
  with_dtype(dtype, [&](auto tag) {
    constexpr DType kDType = decltype(tag)::value;
    constexpr int kBytes = decltype(tag)::bytes;
    if constexpr (kVec * kBytes <= 16) {
      RawVector<kVec> raw{};
      narrow<kDType>(raw, value);
      if (ok) store_raw<kBytes>(address_of<kBytes>(base, index), raw);
      if constexpr (kRound) widen<kDType>(value, raw);
    }
  });
}

template <int kBytes, int kVectors, int kVec>
__device__ __forceinline__ void load_vectors_of(RawVector<kVec> (&raw)[kVectors], const void* base,
                                                int64_t index, int64_t step, int count) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const char* p = address_of<kBytes>(base, index + j * step);
    if (j < count) load_raw<kBytes, LoadPolicy::kCached>(raw[j], p);
  }
}

// Issues the loads of `count` vectors, `step` elements apart, of rows that are walked in a loop and
// read more than once; 0 beyond the count.
template <int kVectors, int kVec>
__device__ __forceinline__ void load_vectors(RawVector<kVec> (&raw)[kVectors], const void* base,
                                             DType dtype, int64_t index, int64_t step, int count) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) raw[j] = RawVector<kVec>{};
  if (dtype == DType::kFloat32) {
    load_vectors_of<4>(raw, base, index, step, count);
  } else {
    load_vectors_of<2>(raw, base, index, step, count);
  }
}

}  // namespace fused_lm
