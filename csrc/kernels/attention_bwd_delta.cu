// What the two passes of attention's backward need of every row:
//
//   delta = rowsum(dout * out) - dlse;  row_lse = lse, or +inf where a row saw no key
//
// With lse = +inf such rows get p = e^-inf = 0 without a question. Dropout needs none either: it
// cancels in rowsum(p dp) = rowsum(dout * out).
//
// Grid: 8 lanes per row, 32 rows per block; rows run over T, then heads, then batches.
// Bytes per row: reads 4 Dv + 4 (+ 4 with dlse), writes 8.
//
// Source: Dao 2023 (arXiv:2307.08691) section 3.1.
#include "common/vec.h"
#include "common/warp.h"
#include "kernels/attention.h"
#include "kernels/attention_tile.h"

namespace fused_lm {
namespace {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 8;
constexpr int kDeltaRows = kDeltaThreads / kDeltaLanes;

template <class Element>
__global__ void __launch_bounds__(kDeltaThreads) attention_bwd_delta(AttentionBackwardParams p) {
  constexpr DType kDType = kDTypeOf<Element>;
  const AttentionShape& shape = p.shape;
  const int64_t index = int64_t{blockIdx.x} * kDeltaRows + threadIdx.x / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x % kDeltaLanes);
  const int64_t heads = static_cast<int64_t>(shape.B) * shape.H;
  const bool inside = index < heads * shape.T;
  const int64_t plane = index / shape.T;
  const int64_t t = index - plane * shape.T;
  const int64_t batch = plane / shape.H;
  const int64_t head = plane - batch * shape.H;
  const uint16_t* gOut =
      p.out + batch * p.out_strides.batch + head * p.out_strides.head + t * p.out_strides.row;
  const uint16_t* gDout =
      p.dout + batch * p.dout_strides.batch + head * p.dout_strides.head + t * p.dout_strides.row;

  float sum[1] = {};
  for (int chunk = lane; inside && chunk * kChunkElements < shape.Dv; chunk += kDeltaLanes) {
    RawVector<8> rOut, rDout;
    load_raw<2, LoadPolicy::kStreaming>(
        rOut, reinterpret_cast<const char*>(gOut + chunk * kChunkElements));
    load_raw<2, LoadPolicy::kCached>(rDout,
                                     reinterpret_cast<const char*>(gDout + chunk * kChunkElements));
    float out[8], dout[8];
    widen<kDType>(out, rOut);
    widen<kDType>(dout, rDout);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[0] = fmaf(out[e], dout[e], sum[0]);
  }
  lanes_sum(sum, kDeltaLanes);
  if (lane != 0 || !inside) return;
  if (p.dlse != nullptr) {
    sum[0] -=
        p.dlse[batch * p.dlse_strides.batch + head * p.dlse_strides.head + t * p.dlse_strides.row];
  }
  const float lse = p.lse[index];
  p.delta[index] = sum[0];
  p.row_lse[index] = lse == kNoScore ? INFINITY : lse;
}

template <class Element>
Status launch_delta(const AttentionBackwardParams& p, Stream stream) {
  const int64_t rows = static_cast<int64_t>(p.shape.B) * p.shape.H * p.shape.T;
  const int64_t blocks = (rows + kDeltaRows - 1) / kDeltaRows;
  if (blocks > INT32_MAX) return "an attention has too many rows";
  return launch(attention_bwd_delta<Element>,
                {dim3(static_cast<unsigned>(blocks)), dim3(kDeltaThreads), 0, stream}, p);
}

}  // namespace

Status attention_delta_bf16(const AttentionBackwardParams& params, Stream stream) {
  return launch_delta<__nv_bfloat16>(params, stream);
}

Status attention_delta_fp16(const AttentionBackwardParams& params, Stream stream) {
  return launch_delta<__half>(params, stream);
}

}  // namespace fused_lm
