// Back through an activation, or dropout, and sums over rows: dpre = dy act'(pre), dbias = the sum
// of its rows.
#pragma once

#include "kernels/gemm.h"

namespace fused_lm {

struct ActivationBackwardParams {
  int M, N;        // N a multiple of 8
  const void* dy;  // [M, N], rows dy_stride apart, a multiple of 8; 16-byte aligned
  int64_t dy_stride;
  bool dy_is_wide;        // fp32, without an activation
  DropoutParams dropout;  // of dy, without an activation; batch and head 0
  const uint16_t* pre;    // [M, N] contiguous; null: there is no activation
  uint16_t* dpre;         // [M, N] contiguous; null, without an activation: it is dy
  float* partial;         // [strips, N], sums of each strip's rows; null: nobody asks
  int strips;             // activation_strips
  Activation activation;
  bool gated;  // pre, dpre and partial have 2 N columns, gates first
};

struct ColumnSumsParams {
  int strips, N;
  const float* partial;  // [strips, N]
  uint16_t* out;         // [N]: their sums, in the order of the strips
};

constexpr int kActivationRows = 8;       // at once per block, one per warp
constexpr int kActivationColumns = 256;  // per block, 16 bytes per lane

// As many blocks as fill the GPU, each with rows enough.
constexpr int activation_strips(int M, int N, int sms) {
  constexpr int kBlocksPerSm = 8;
  const int columns = (N + kActivationColumns - 1) / kActivationColumns;
  const int wanted = (sms * kBlocksPerSm + columns - 1) / columns;
  const int rows = (M + kActivationRows - 1) / kActivationRows;
  return wanted < rows ? wanted : rows;
}

Status activation_bwd(const ActivationBackwardParams& params, DType dtype, Stream stream);
Status column_sums(const ColumnSumsParams& params, DType dtype, Stream stream);

}  // namespace fused_lm
