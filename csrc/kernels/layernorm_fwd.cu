// LayerNorm and RMSNorm forward, with dropout and the residual add in the same pass.
//
//   stream = residual + keep * x       fp32, rounded to the stream's dtype, then normalised
//   mean   = m + d,  m = mean(stream),  d = mean(stream - m) or 0      RMSNorm: m = d = 0
//   rstd   = 1 / sqrt(mean((stream - m)^2) - d^2 + eps)
//   y      = (stream - m - d) * rstd * weight + bias
//
// Two passes over registers, never E[x^2] - E[x]^2. d is what rounding left in a large m: a common
// offset of 1000 costs y no digits. Columns beyond C add 0 to all sums.
//
// norm_fwd: 8, 16 or 32 lanes hold a row, or whole warps that share a block; grid ceil(N / B), B =
// groups * R rows to a block, of which a thread holds R: row j of group g is block * B + j * groups
// + g. R is 1; up to C = 256 it is 4 with 8 elements to a vector, else 2.
// norm_fwd_looped: one row per block, which walks it three times (RMSNorm: twice). Later walks read
// what the first one stored, or x where there is no stream. Loads of two vectors are under way
// before the first use.
// layernorm_tuning.h: which one, and B. layernorm_types.h: dtypes, and vectors or scalars.
//
// Bytes, with sizes s of the elements, 0 for what is null:
//   norm_fwd reads   N C (s_x + s_residual) + ceil(N / B) groups C (s_weight + s_bias)
//   looped   reads   N C (s_x + s_residual + L s) + N C (s_weight + s_bias), L = 2 (RMSNorm: 1)
//                    more walks, s = s_stream, or s_x without a stream
//   both     write   N C (s_y + s_stream) + 8 N (RMSNorm: 4 N)
//   dropout  reads   32 bytes of rng per thread, the same ones for all
// The L1 or L2 serves the parameters but once per SM.
// FLOPs: 9 N C. Philox calls: N C / 8 with vectors of 8, / 4 with 4, N C with scalars.
//
// Shared memory, NormForwardShared: a slot per warp for m, another for d and the variance.
//
// | barrier | who                       | why                                                     |
// | 1 + row | the warps of a row, where | slots are written before they are read; both sums have  |
// |         | it has several            | slots of their own, so none is written twice            |
//
// Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467);
// Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance" (d).
#include "kernels/layernorm.h"
#include "kernels/layernorm_fwd_row.h"
#include "kernels/layernorm_tuning.h"
#include "kernels/layernorm_types.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

template <class TypeRow, int kVec, int kElements, int kRows>
__global__ void __launch_bounds__(norm_forward_threads_per_sm(kVec), 1)
    norm_fwd(const NormForwardParams params, int threads_per_row, float inverse_C) {
  const NormForwardParams p = TypeRow::known(params);
  constexpr int kSlots = kElements / kVec;
  auto& shared = dynamic_smem<NormForwardShared<kRows>>();
  const RowThread at = row_thread(threads_per_row);
  const int groups = static_cast<int>(blockDim.x) / threads_per_row;
  const RowTile tile{at,
                     static_cast<int64_t>(blockIdx.x) * groups * kRows + at.row,
                     groups,
                     p.N,
                     static_cast<int>(p.C),
                     inverse_C};

  // load: nothing waits before the last load of the tile is on its way
  RawVector<kVec> rX[kSlots][kRows];
  RawVector<kVec> rResidual[kSlots][kRows];
  load_rows(rX, p.x, p.x_dtype, p.x_stride, tile);
  if (p.residual != nullptr) {
    load_rows(rResidual, p.residual, p.residual_dtype, p.residual_stride, tile);
  }

  // stream
  const DropoutKey key = norm_dropout_key(p.dropout);
  float value[kSlots][kRows][kVec];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int column = at.column<kVec>(i);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float residual[kVec] = {};
      widen_vector(value[i][j], rX[i][j], p.x_dtype);
      if (p.residual != nullptr) widen_vector(residual, rResidual[i][j], p.residual_dtype);
      const bool ok = column < tile.C && tile.row(j) < p.N;
      make_stream(value[i][j], residual, p, key, tile.row(j), column, ok);
    }
  }

  // statistics
  Statistics<kRows> rows{};
  if (p.mean != nullptr) centre(value, rows, shared, tile);
  measure(value, rows, shared, tile, p.eps);
  if (at.thread == 0) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const float mean = rows.mean[j] + rows.drift[j];
      if (tile.row(j) < p.N) store_statistics(p, tile.row(j), mean, rows.rstd[j]);
    }
  }

  // output
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int column = at.column<kVec>(i);
    if (column >= tile.C) continue;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        value[i][j][e] = (value[i][j][e] - rows.drift[j]) * rows.rstd[j];
      }
    }
    RawParameters<kVec> rParameters;
    load_parameters(rParameters, p, column);
    apply_parameters(value[i], p, rParameters);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t index = tile.row(j) * p.C + column;
      store_vector<false>(p.y, p.y_dtype, index, tile.row(j) < p.N, value[i][j]);
    }
  }
}

template <int kVec>
__global__ void __launch_bounds__(kNormLoopThreads, kNormLoopForwardBlocks)
    norm_fwd_looped(const NormForwardParams p, float inverse_C) {
  auto& shared = dynamic_smem<NormForwardShared<1>>();
  const RowThread at = row_thread(kNormLoopThreads);
  const int64_t row = blockIdx.x;
  const int64_t first = at.thread * kVec;
  constexpr int64_t kStep = kNormLoopThreads * kVec;
  constexpr int64_t kPass = kNormLoopVectors * kStep;
  const bool centred = p.mean != nullptr;

  // stream and its sum
  const DropoutKey key = norm_dropout_key(p.dropout);
  float total[1] = {};
  for (int64_t column = first; column < p.C; column += kPass) {
    RawVector<kVec> rX[kNormLoopVectors];
    RawVector<kVec> rResidual[kNormLoopVectors];
    const int count = looped_vectors<kStep>(p.C - column);
    load_vectors(rX, p.x, p.x_dtype, row * p.x_stride + column, kStep, count);
    if (p.residual != nullptr) {
      load_vectors(rResidual, p.residual, p.residual_dtype, row * p.residual_stride + column, kStep,
                   count);
    }
#pragma unroll
    for (int i = 0; i < kNormLoopVectors; ++i) {
      if (i >= count) break;
      float value[kVec];
      float residual[kVec] = {};
      widen_vector(value, rX[i], p.x_dtype);
      if (p.residual != nullptr) widen_vector(residual, rResidual[i], p.residual_dtype);
      make_stream(value, residual, p, key, row, column + i * kStep, true);
#pragma unroll
      for (int e = 0; e < kVec; ++e) total[0] += centred ? value[e] : value[e] * value[e];
    }
  }
  row_sum(total, shared.sums, at);

  // Every thread reads again what it has stored itself.
  const bool stored = p.stream != nullptr;
  const void* source = stored ? p.stream : p.x;
  const DType dtype = stored ? p.stream_dtype : p.x_dtype;
  const int64_t row_off = row * (stored ? p.C : p.x_stride);

  // statistics
  const float mean = centred ? total[0] * inverse_C : 0.0f;
  float sums[2] = {0.0f, centred ? 0.0f : total[0]};
  if (centred) {
    for (int64_t column = first; column < p.C; column += kPass) {
      RawVector<kVec> rSource[kNormLoopVectors];
      const int count = looped_vectors<kStep>(p.C - column);
      load_vectors(rSource, source, dtype, row_off + column, kStep, count);
#pragma unroll
      for (int i = 0; i < kNormLoopVectors; ++i) {
        if (i >= count) break;
        float value[kVec];
        widen_vector(value, rSource[i], dtype);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          sums[0] += value[e] - mean;
          sums[1] += (value[e] - mean) * (value[e] - mean);
        }
      }
    }
    row_sum(sums, shared.centred, at);
  }
  const float mean_square = sums[1] * inverse_C;
  const float drift = drift_of(sums[0] * inverse_C, mean, mean_square);
  const float rstd = rstd_of(mean_square, drift, p.eps);
  if (at.thread == 0) store_statistics(p, row, mean + drift, rstd);

  // output
  for (int64_t column = first; column < p.C; column += kPass) {
    RawVector<kVec> rSource[kNormLoopVectors];
    const int count = looped_vectors<kStep>(p.C - column);
    load_vectors(rSource, source, dtype, row_off + column, kStep, count);
    RawParameters<kVec> rParameters[kNormLoopVectors];
#pragma unroll
    for (int i = 0; i < kNormLoopVectors; ++i) {
      if (i < count) load_parameters(rParameters[i], p, column + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < kNormLoopVectors; ++i) {
      if (i >= count) break;
      float value[1][kVec];
      widen_vector(value[0], rSource[i], dtype);
#pragma unroll
      for (int e = 0; e < kVec; ++e) value[0][e] = (value[0][e] - mean - drift) * rstd;
      apply_parameters(value, p, rParameters[i]);
      store_vector<false>(p.y, p.y_dtype, row * p.C + column + i * kStep, true, value[0]);
    }
  }
}

template <class TypeRow, int kVec, NormShape kShape>
Status launch_rows(const NormForwardParams& p, const NormTuning& tuning, Stream stream) {
  constexpr NormShapeSize kSize = norm_forward_size(kShape, kVec);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.N, tuning.rows_per_block())));
  const dim3 block(tuning.threads());
  return launch(norm_fwd<TypeRow, kVec, kSize.elements, kSize.rows>,
                {grid, block, sizeof(NormForwardShared<kSize.rows>), stream}, p,
                tuning.threads_per_row, inverse_of(p.C));
}

template <int kVec>
Status launch_looped(const NormForwardParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.N));
  return launch(norm_fwd_looped<kVec>,
                {grid, dim3(kNormLoopThreads), sizeof(NormForwardShared<1>), stream}, p,
                inverse_of(p.C));
}

}  // namespace

Status norm_forward(const NormForwardParams& p, Stream stream) {
  if (p.N == 0) return kOk;
  const int width = vector_width(p);
  const NormTuning tuning = norm_forward_tuning(p.C, width);
  if (ceil_div(p.N, tuning.rows_per_block()) > INT32_MAX) return "a norm has too many rows";
  if (tuning.shape == NormShape::kLooped) {
    return width == 1 ? launch_looped<1>(p, stream) : launch_looped<4>(p, stream);
  }
  return with_type_row(p, width, [&](auto type_row, auto vector) {
    using TypeRow = decltype(type_row);
    constexpr int kVec = decltype(vector)::value;
    return tuning.shape == NormShape::kNarrow
               ? launch_rows<TypeRow, kVec, NormShape::kNarrow>(p, tuning, stream)
               : launch_rows<TypeRow, kVec, NormShape::kWhole>(p, tuning, stream);
  });
}

}  // namespace fused_lm
