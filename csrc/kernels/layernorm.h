// LayerNorm and RMSNorm with dropout and residual add before them: what a launch needs.
//
//   stream = residual + dropout(x);  y = (stream - mean) * rstd * weight + bias
//
// An RMSNorm is a call with mean == nullptr: its mean is 0, and rstd = rsqrt(mean(stream^2) + eps).
// No torch here: csrc/layernorm.cpp fills these in.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fused_lm {

struct NormForwardParams {
  const void* x;         // [N, C]
  const void* residual;  // [N, C] or null
  const void* weight;    // [C] or null
  const void* bias;      // [C] or null
  void* y;               // [N, C], rows adjacent
  void* stream;          // [N, C], rows adjacent; null where it would be x
  float* mean;           // [N]; null: RMSNorm
  float* rstd;           // [N]
  int64_t N;
  int64_t C;
  int64_t x_stride;         // elements between rows; columns are adjacent
  int64_t residual_stride;  // the same
  float eps;
  DropoutParams dropout;
  DType x_dtype, residual_dtype, weight_dtype, bias_dtype, y_dtype, stream_dtype;
};

struct NormBackwardParams {
  const void* dy;          // [N, C]
  const void* dstream;     // [N, C] or null: gradient that arrives at the stream itself
  const void* stream;      // [N, C]
  const void* weight;      // [C] or null
  const float* mean;       // [N]; null: RMSNorm
  const float* rstd;       // [N]
  void* dx;                // [N, C], rows adjacent
  void* dresidual;         // [N, C], rows adjacent; null where it would equal dx or is not wanted
  void* dweight;           // [C] or null
  void* dbias;             // [C] or null
  float* dweight_partial;  // [strips, C] or null
  float* dbias_partial;    // [strips, C] or null
  int64_t N;
  int64_t C;
  int64_t strips;  // norm_backward_strips
  int64_t dy_stride;
  int64_t dstream_stride;
  int64_t stream_stride;
  DropoutParams dropout;
  DType dy_dtype, dstream_dtype, stream_dtype, weight_dtype;
  DType dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype;
};

Status norm_forward(const NormForwardParams& params, Stream stream);

// Rows of the partial sums, one per block of the persistent grid: a fixed number for a shape and
// a GPU, so that sums always run in one order.
int64_t norm_backward_strips(const NormBackwardParams& params, int multiprocessors);

// Two launches: dx, dresidual and the partial sums of dweight and dbias; then one that adds them.
Status norm_backward(const NormBackwardParams& params, Stream stream);

}  // namespace fused_lm
