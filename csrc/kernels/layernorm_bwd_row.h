// What the two backward norm kernels do with a row.
#pragma once

#include "kernels/layernorm_row.h"
#include "kernels/layernorm_tuning.h"

namespace fused_lm {

// A row as its loads leave it.
template <int kSlots, int kVec>
struct RowInputs {
  RawVector<kVec> dy[kSlots][1];
  RawVector<kVec> stream[kSlots][1];
  float mean;
  float rstd;
};

__device__ __forceinline__ float mean_of(const NormBackwardParams& p, int64_t row) {
  return p.mean != nullptr && row < p.N ? p.mean[row] : 0.0f;
}

__device__ __forceinline__ float rstd_of(const NormBackwardParams& p, int64_t row) {
  return row < p.N ? p.rstd[row] : 0.0f;
}

// Issues the loads of a row; zeros where there is none, which add nothing to any sum.
template <int kSlots, int kVec>
__device__ __forceinline__ void load_inputs(RowInputs<kSlots, kVec>& inputs,
                                            const NormBackwardParams& p, const RowTile& tile) {
  load_rows(inputs.dy, p.dy, p.dy_dtype, p.dy_stride, tile);
  load_rows(inputs.stream, p.stream, p.stream_dtype, p.stream_stride, tile);
  inputs.mean = mean_of(p, tile.first_row);
  inputs.rstd = rstd_of(p, tile.first_row);
}

// The stream's values become xhat.
template <int kVec>
__device__ __forceinline__ void normalise(float (&value)[kVec], float mean, float rstd) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) value[e] = (value[e] - mean) * rstd;
}

template <int kVec>
__device__ __forceinline__ void add_parameter_gradients(float (&dweight)[kVec],
                                                        float (&dbias)[kVec],
                                                        const float (&dy)[kVec],
                                                        const float (&xhat)[kVec]) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    dweight[e] += dy[e] * xhat[e];
    dbias[e] += dy[e];
  }
}

// dy becomes g = dy * weight. Each dtype multiplies in its own branch: values that wait behind a
// branch for the multiplication would be registers too many.
template <int kVec>
__device__ __forceinline__ void weigh(float (&dy)[kVec], const NormBackwardParams& p,
                                      int64_t column, bool ok) {
  if (p.weight == nullptr || !ok) return;
  with_dtype(p.weight_dtype, [&](auto tag) {
    constexpr DType kDType = decltype(tag)::value;
    constexpr int kPiece = kVec == 8 && kDType == DType::kFloat32 ? 4 : kVec;
#pragma unroll
    for (int first = 0; first < kVec; first += kPiece) {
      RawVector<kPiece> raw;
      load_raw<decltype(tag)::bytes, LoadPolicy::kCached>(
          raw, address_of<decltype(tag)::bytes>(p.weight, column + first));
      float weight[kPiece];
      widen<kDType>(weight, raw);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) dy[first + e] *= weight[e];
    }
  });
}

// Adds g * xhat to sums[0] and g to sums[1].
template <int kVec>
__device__ __forceinline__ void add_row_sums(float* sums, const float (&g)[kVec],
                                             const float (&xhat)[kVec]) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    sums[0] += g[e] * xhat[e];
    sums[1] += g[e];
  }
}

// g becomes the stream's gradient, which goes to dresidual as it is and to dx through the mask.
template <int kVec>
__device__ __forceinline__ void store_gradients(const NormBackwardParams& p, float (&g)[kVec],
                                                const float (&xhat)[kVec],
                                                const float (&dstream)[kVec],
                                                const float (&means)[2], float rstd,
                                                const DropoutKey& key, int64_t row, int64_t column,
                                                bool ok) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) g[e] = (g[e] - means[1] - xhat[e] * means[0]) * rstd;
  if (p.dstream != nullptr) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) g[e] += dstream[e];
  }
  const int64_t index = row * p.C + column;
  if (p.dresidual != nullptr) store_vector<false>(p.dresidual, p.dresidual_dtype, index, ok, g);
  if (p.dropout.rng != nullptr) drop(g, p.dropout, key, row, column);
  store_vector<false>(p.dx, p.dx_dtype, index, ok, g);
}

// Means over the row of g * xhat and, unless RMSNorm, of g.
__device__ __forceinline__ void means_of(float (&means)[2], const float* sums, float inverse_C,
                                         bool centred) {
  means[0] = sums[0] * inverse_C;
  means[1] = centred ? sums[1] * inverse_C : 0.0f;
}

struct NormBackwardShared {
  float sums[2][2][kNormMaxWarps];
  float dweight[kNormNarrowElements][kNormBackwardSharedThreads];
  float dbias[kNormNarrowElements][kNormBackwardSharedThreads];
};
static_assert(sizeof(NormBackwardShared) == 512 + 2 * 8 * 160 * 4);

// Adds what the groups of the block hold, first to last. True for the threads that have the total.
template <int kSlots, int kVec>
__device__ __forceinline__ bool add_groups(float (&dweight)[kSlots][kVec],
                                           float (&dbias)[kSlots][kVec], NormBackwardShared& shared,
                                           const RowThread& at) {
  if (at.threads < kWarpSize) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      strided_lanes_sum(dweight[i], at.threads);
      strided_lanes_sum(dbias[i], at.threads);
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
  const bool owner = thread % kWarpSize < at.threads;
  const int width = at.threads < kWarpSize ? kWarpSize : at.threads;
  const int unit = thread / width;
  const int last = static_cast<int>(blockDim.x) / width - 1;
  if (last == 0) return owner;
  for (int u = 0; u <= last; ++u) {
    if (u > 0) __syncthreads();
    if (unit != u || !owner) continue;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        float& sDweight = shared.dweight[i * kVec + e][at.thread];
        float& sDbias = shared.dbias[i * kVec + e][at.thread];
        if (u > 0) dweight[i][e] += sDweight, dbias[i][e] += sDbias;
        if (u < last) sDweight = dweight[i][e], sDbias = dbias[i][e];
      }
    }
  }
  return owner && unit == last;
}

// kNormLoopRows adjacent rows, or as many as are left; mean and rstd are 0 where there is none.
struct LoopedRows {
  int64_t first;
  int count;
  float mean[kNormLoopRows];
  float rstd[kNormLoopRows];
};

__device__ __forceinline__ LoopedRows looped_rows(const NormBackwardParams& p, int64_t first) {
  LoopedRows rows;
  rows.first = first;
  rows.count = p.N - first < kNormLoopRows ? static_cast<int>(p.N - first) : kNormLoopRows;
#pragma unroll
  for (int j = 0; j < kNormLoopRows; ++j) {
    rows.mean[j] = mean_of(p, first + j);
    rows.rstd[j] = rstd_of(p, first + j);
  }
  return rows;
}

// A column vector of these rows as its loads leave it.
template <int kVec>
struct LoopedInputs {
  RawVector<kVec> dy[kNormLoopRows];
  RawVector<kVec> stream[kNormLoopRows];
  RawParameter<kVec> weight;
};

// Issues the loads of a column vector: neither a dtype nor a missing row makes one of them wait for
// another.
template <int kVec>
__device__ __forceinline__ void load_looped(LoopedInputs<kVec>& inputs, const NormBackwardParams& p,
                                            const LoopedRows& rows, int64_t column) {
  load_vectors(inputs.dy, p.dy, p.dy_dtype, rows.first * p.dy_stride + column, p.dy_stride,
               rows.count);
  load_vectors(inputs.stream, p.stream, p.stream_dtype, rows.first * p.stream_stride + column,
               p.stream_stride, rows.count);
  inputs.weight = RawParameter<kVec>{};
  if (p.weight != nullptr) load_parameter(inputs.weight, p.weight, p.weight_dtype, column);
}

// 1 where there is no weight.
template <int kVec>
__device__ __forceinline__ void weight_of(float (&weight)[kVec], const LoopedInputs<kVec>& inputs,
                                          const NormBackwardParams& p) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) weight[e] = 1.0f;
  if (p.weight != nullptr) widen_parameter(weight, inputs.weight, p.weight_dtype);
}

// dy and xhat of row j.
template <int kVec>
__device__ __forceinline__ void widen_looped(float (&dy)[kVec], float (&xhat)[kVec],
                                             const LoopedInputs<kVec>& inputs,
                                             const NormBackwardParams& p, const LoopedRows& rows,
                                             int j) {
  widen_vector(dy, inputs.dy[j], p.dy_dtype);
  widen_vector(xhat, inputs.stream[j], p.stream_dtype);
  normalise(xhat, rows.mean[j], rows.rstd[j]);
}

// Sums over columns of kNormLoopRows rows: g * xhat and g of each.
template <int kVec>
__device__ __forceinline__ void looped_sums(float (&sums)[2 * kNormLoopRows],
                                            const NormBackwardParams& p, const LoopedRows& rows,
                                            int64_t first_column, int64_t step) {
  for (int64_t column = first_column; column < p.C; column += step) {
    LoopedInputs<kVec> inputs;
    load_looped(inputs, p, rows, column);
    float weight[kVec];
    weight_of(weight, inputs, p);
#pragma unroll
    for (int j = 0; j < kNormLoopRows; ++j) {
      float g[kVec];
      float xhat[kVec];
      widen_looped(g, xhat, inputs, p, rows, j);
#pragma unroll
      for (int e = 0; e < kVec; ++e) g[e] *= weight[e];
      add_row_sums(sums + 2 * j, g, xhat);
    }
  }
}

// Gradients of kNormLoopRows rows at kVec columns; adds their part of dweight and dbias.
template <int kVec>
__device__ __forceinline__ void looped_gradients(const NormBackwardParams& p,
                                                 const float (&means)[kNormLoopRows][2],
                                                 const DropoutKey& key, const LoopedRows& rows,
                                                 int64_t column, float (&dweight)[kVec],
                                                 float (&dbias)[kVec]) {
  LoopedInputs<kVec> inputs;
  RawVector<kVec> rDstream[kNormLoopRows];
  load_looped(inputs, p, rows, column);
  if (p.dstream != nullptr) {
    load_vectors(rDstream, p.dstream, p.dstream_dtype, rows.first * p.dstream_stride + column,
                 p.dstream_stride, rows.count);
  }
  float weight[kVec];
  weight_of(weight, inputs, p);
#pragma unroll
  for (int j = 0; j < kNormLoopRows; ++j) {
    float g[kVec];
    float xhat[kVec];
    float dstream[kVec] = {};
    widen_looped(g, xhat, inputs, p, rows, j);
    if (p.dstream != nullptr) widen_vector(dstream, rDstream[j], p.dstream_dtype);
    add_parameter_gradients(dweight, dbias, g, xhat);
#pragma unroll
    for (int e = 0; e < kVec; ++e) g[e] *= weight[e];
    store_gradients(p, g, xhat, dstream, means[j], rows.rstd[j], key, rows.first + j, column,
                    j < rows.count);
  }
}

}  // namespace fused_lm
