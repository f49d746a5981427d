// What the two forward norm kernels do with a row.
#pragma once

#include "kernels/layernorm_row.h"
#include "kernels/layernorm_tuning.h"

namespace fused_lm {

template <int kRows>
struct NormForwardShared {
  float sums[kRows][kNormMaxWarps];
  float centred[2 * kRows][kNormMaxWarps];
};
static_assert(sizeof(NormForwardShared<1>) == 384);
static_assert(sizeof(NormForwardShared<4>) == 1536);

template <int kRows>
struct Statistics {
  float mean[kRows];
  float drift[kRows];
  float rstd[kRows];
};

// Of equal values the two terms cancel, and what is left may be below 0; a NaN must stay one.
__device__ __forceinline__ float rstd_of(float mean_square, float drift, float eps) {
  const float variance = mean_square - drift * drift;
  return rsqrtf((variance < 0.0f ? 0.0f : variance) + eps);
}

// What a mean still lacks. Values near a large mean leave exact differences, whose mean corrects
// it. Where values are larger than their mean the differences are rounded, all alike if x has few
// bits, and the mean is better as it is.
__device__ __forceinline__ float drift_of(float difference, float mean, float mean_square) {
  return mean * mean > mean_square ? difference : 0.0f;
}

// Turns x into the stream as it is stored.
template <int kVec>
__device__ __forceinline__ void make_stream(float (&value)[kVec], const float (&residual)[kVec],
                                            const NormForwardParams& p, const DropoutKey& key,
                                            int64_t row, int64_t column, bool ok) {
  if (p.dropout.rng != nullptr) drop(value, p.dropout, key, row, column);
  if (p.residual != nullptr) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) value[e] += residual[e];
  }
  if (p.stream != nullptr) {
    store_vector<true>(p.stream, p.stream_dtype, row * p.C + column, ok, value);
  }
}

// Subtracts the mean of every row.
template <int kSlots, int kRows, int kVec>
__device__ __forceinline__ void centre(float (&value)[kSlots][kRows][kVec], Statistics<kRows>& rows,
                                       NormForwardShared<kRows>& shared, const RowTile& tile) {
  float sums[kRows] = {};
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) sums[j] += value[i][j][e];
    }
  }
  row_sum(sums, shared.sums, tile.at);
#pragma unroll
  for (int j = 0; j < kRows; ++j) rows.mean[j] = sums[j] * tile.inverse_C;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const bool ok = tile.at.column<kVec>(i) < tile.C;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) value[i][j][e] = ok ? value[i][j][e] - rows.mean[j] : 0.0f;
    }
  }
}

// Fills drift and rstd.
template <int kSlots, int kRows, int kVec>
__device__ __forceinline__ void measure(const float (&value)[kSlots][kRows][kVec],
                                        Statistics<kRows>& rows, NormForwardShared<kRows>& shared,
                                        const RowTile& tile, float eps) {
  float sums[2 * kRows] = {};
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        sums[2 * j] += value[i][j][e];
        sums[2 * j + 1] += value[i][j][e] * value[i][j][e];
      }
    }
  }
  row_sum(sums, shared.centred, tile.at);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float mean_square = sums[2 * j + 1] * tile.inverse_C;
    rows.drift[j] = drift_of(sums[2 * j] * tile.inverse_C, rows.mean[j], mean_square);
    rows.rstd[j] = rstd_of(mean_square, rows.drift[j], eps);
  }
}

template <int kVec>
struct RawParameters {
  RawParameter<kVec> weight;
  RawParameter<kVec> bias;
};

template <int kVec>
__device__ __forceinline__ void load_parameters(RawParameters<kVec>& raw,
                                                const NormForwardParams& p, int64_t column) {
  raw = RawParameters<kVec>{};
  if (p.weight != nullptr) load_parameter(raw.weight, p.weight, p.weight_dtype, column);
  if (p.bias != nullptr) load_parameter(raw.bias, p.bias, p.bias_dtype, column);
}

// value = value * weight + bias, one load of each for all rows.
template <int kRows, int kVec>
__device__ __forceinline__ void apply_parameters(float (&value)[kRows][kVec],
                                                 const NormForwardParams& p,
                                                 const RawParameters<kVec>& raw) {
  float term[kVec];
  if (p.weight != nullptr) {
    widen_parameter(term, raw.weight, p.weight_dtype);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) value[j][e] *= term[e];
    }
  }
  if (p.bias != nullptr) {
    widen_parameter(term, raw.bias, p.bias_dtype);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) value[j][e] += term[e];
    }
  }
}

// How many of kNormLoopVectors vectors, kStep columns apart, start in the `columns` that are left.
template <int64_t kStep>
__device__ __forceinline__ int looped_vectors(int64_t columns) {
  return columns > (kNormLoopVectors - 1) * kStep ? kNormLoopVectors
                                                  : static_cast<int>((columns + kStep - 1) / kStep);
}

__device__ __forceinline__ void store_statistics(const NormForwardParams& p, int64_t row,
                                                 float mean, float rstd) {
  if (p.mean != nullptr) p.mean[row] = mean;
  p.rstd[row] = rstd;
}

}  // namespace fused_lm
