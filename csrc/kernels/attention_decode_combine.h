// The parts of a row's softmax put together: of the warps of a block, and of splits.
//
//   m = max m_i;  l = sum l_i e^(m_i - m);  out = sum acc_i e^(m_i - m) / l;  lse = m + ln l
//
// A part is a maximum m_i (or a number near it: attention_softmax.h), the sum l_i of e^(s - m_i)
// and the sums acc_i of e^(s - m_i) v. Not out and lse: an lse of 1e9 has lost its logarithm. Parts
// are added in their order, so results repeat bitwise.
//
// attention_decode_combine: one block per row, its warps take every fourth split, a lane four
// columns at a time. Bytes: splits (4 Dv + 8) per row, and the row of out.
#pragma once

#include "common/warp.h"
#include "kernels/attention_decode.h"
#include "kernels/attention_decode_keys.h"
#include "ptx/math.h"

namespace fused_lm {
namespace attention_decode {

// A part's maximum, and its sum of e^(s - max): 0 where it has no key.
struct Extremes {
  float max, sum;

  // What the part's sums count for beside parts whose largest maximum is `most`.
  __device__ __forceinline__ float factor(float most) const {
    return sum != 0.0f ? ptx::exp2_approx((max - most) * kLog2E) : 0.0f;
  }
  __device__ __forceinline__ void store(float its_max, float its_sum) {
    const float2 both = {its_max, its_sum};
    *reinterpret_cast<float2*>(this) = both;
  }
  __device__ __forceinline__ Extremes load() const {
    const float2 both = *reinterpret_cast<const float2*>(this);
    return {both.x, both.y};
  }
};
static_assert(sizeof(Extremes) == sizeof(float2));

// Of `count` parts, which part(i) tells.
template <int kUnroll, class Part>
__device__ __forceinline__ Extremes combined(int count, const Part& part) {
  Extremes total{kNoScore, 0.0f};
#pragma unroll kUnroll
  for (int i = 0; i < count; ++i) {
    const Extremes own = part(i);
    total.max = own.sum != 0.0f ? fmaxf(total.max, own.max) : total.max;
  }
#pragma unroll kUnroll
  for (int i = 0; i < count; ++i) {
    const Extremes own = part(i);
    total.sum += own.sum * own.factor(total.max);
  }
  return total;
}

// Of tensors [splits, B H T, ..]: the index of a row.
__device__ __forceinline__ int64_t row_of_split(const AttentionDecodeParams& p, const Place& place,
                                                int row) {
  const int rows = rows_per_head(p.shape);
  const int64_t heads = int64_t{p.shape.B} * (p.shape.H / p.shape.group);
  const int64_t head = int64_t{place.batch} * (p.shape.H / p.shape.group) + place.kv_head;
  return (place.split * heads + head) * rows + place.row + row;
}

__device__ __forceinline__ Extremes* extremes_of(const AttentionDecodeParams& p, int64_t row) {
  return reinterpret_cast<Extremes*>(p.extremes) + row;
}

// Four columns of a row of a split.
__device__ __forceinline__ void store_split(const AttentionDecodeParams& p, const Place& place,
                                            int row, int column, const float (&sum)[4],
                                            const Extremes& total) {
  const int64_t index = row_of_split(p, place, row);
  if (column == 0) extremes_of(p, index)->store(total.max, total.sum);
  store_floats(p.partial, index * p.shape.Dv + column, sum);
}

// What a split without keys leaves: its sums are not read.
__device__ __forceinline__ void leave_empty(const AttentionDecodeParams& p, const Place& place) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kDecodeRows || place.row + row >= rows_per_head(p.shape)) return;
  extremes_of(p, row_of_split(p, place, row))->store(kNoScore, 0.0f);
}

// Four columns of a row of out, and its lse.
template <DType kDType>
__device__ __forceinline__ void store_row(const AttentionDecodeParams& p, int batch, int kv_head,
                                          int row, int column, const float (&sum)[4],
                                          const Extremes& total) {
  const QueryIndex query = query_of_row(p.shape, kv_head, row);
  const float factor = total.sum != 0.0f ? __fdividef(1.0f, total.sum) : 0.0f;
  const uint2 packed = {narrow_pair<kDType>(sum[0] * factor, sum[1] * factor),
                        narrow_pair<kDType>(sum[2] * factor, sum[3] * factor)};
  uint16_t* gRow =
      p.out + head_offset(p.out_strides, batch, query.head) + query.t * p.out_strides.row + column;
  *reinterpret_cast<uint2*>(gRow) = packed;
  if (column != 0) return;
  const int64_t index = (int64_t{batch} * p.shape.H + query.head) * p.shape.T + query.t;
  p.lse[index] = total.sum != 0.0f ? total.max + logf(total.sum) : kNoScore;
}

constexpr int kCombineWarps = 4;
constexpr int kCombineUnroll = 4;                        // loads under way
constexpr int kLaneColumns = 4;                          // of a lane at a time
constexpr int kPieceColumns = kWarpSize * kLaneColumns;  // of a warp at a time
constexpr int kPieces = kMaxHeadDim / kPieceColumns;

struct CombineStorage {
  float4 sums[kCombineWarps][kPieces][kWarpSize];
};

template <DType kDType>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    attention_decode_combine(AttentionDecodeParams p, int batch_first) {
  auto& smem = dynamic_smem<CombineStorage>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = own_lane();
  const Place place{static_cast<int>(blockIdx.x), 0, static_cast<int>(blockIdx.y),
                    static_cast<int>(blockIdx.z) + batch_first};
  const int64_t first = row_of_split(p, place, 0);
  const int64_t step = int64_t{p.shape.B} * p.shape.H * p.shape.T;  // rows of a split
  const auto part = [&](int i) { return extremes_of(p, first + i * step)->load(); };
  const Extremes total = combined<kCombineUnroll>(p.splits, part);

  float sum[kPieces][kLaneColumns] = {};
#pragma unroll kCombineUnroll
  for (int i = warp; i < p.splits; i += kCombineWarps) {
    const float factor = part(i).factor(total.max);
    if (factor == 0.0f) continue;  // nobody may have written its sums
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = piece * kPieceColumns + lane * kLaneColumns;
      if (column >= p.shape.Dv) continue;
      float own[kLaneColumns];
      load_floats(own, p.partial, (first + i * step) * p.shape.Dv + column);
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) sum[piece][e] = fmaf(factor, own[e], sum[piece][e]);
    }
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const float4 whole = {sum[piece][0], sum[piece][1], sum[piece][2], sum[piece][3]};
    smem.sums[warp][piece][lane] = whole;
  }
  __syncthreads();
  const int piece = warp, column = warp * kPieceColumns + lane * kLaneColumns;
  if (piece >= kPieces || column >= p.shape.Dv) return;
  float all[kLaneColumns] = {};
#pragma unroll
  for (int other = 0; other < kCombineWarps; ++other) {
    const float4 own = smem.sums[other][piece][lane];
    all[0] += own.x, all[1] += own.y, all[2] += own.z, all[3] += own.w;
  }
  store_row<kDType>(p, place.batch, place.kv_head, place.row, column, all, total);
}

template <DType kDType>
Status launch_combine(const AttentionDecodeParams& p, Stream stream) {
  return launch_grid(attention_decode_combine<kDType>, p, rows_per_head(p.shape),
                     p.shape.H / p.shape.group, p.shape.B, kCombineWarps * kWarpSize,
                     sizeof(CombineStorage), stream);
}

}  // namespace attention_decode
}  // namespace fused_lm
