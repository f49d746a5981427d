// Back through an activation where no product's epilogue does it, and sums over rows.
//
// activation_bwd: dpre = dy act'(pre), and of every strip of rows the sums of dpre, before it is
// rounded. Grid (256 columns, strip). A warp has a row, a lane 8 of its columns: 16 bytes. Rows of
// a strip are `strips` apart, 8 at a time. Bytes: 4 M N read, 2 M N written; 2 M N read where there
// is no activation. The warps' sums meet in shared memory, in the order of the warps.
//
// column_sums: adds the strips, 8 threads per column and then those, always in one order: results
// repeat.
#include "common/vec.h"
#include "kernels/activation.h"
#include "kernels/activation_bwd.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

constexpr int kVector = 8;
constexpr int kThreads = kActivationRows * kWarpSize;
constexpr int kPartThreads = 8;  // per column of column_sums

struct WarpSums {
  alignas(16) float row[kActivationRows][kActivationColumns];
};

struct PartSums {
  float part[kPartThreads][kWarpSize];
};

template <DType kDType>
__device__ __forceinline__ void load_row(float (&value)[kVector], const uint16_t* gRow) {
  RawVector<kVector> raw;
  load_raw<2, LoadPolicy::kStreaming>(raw, reinterpret_cast<const char*>(gRow));
  widen<kDType>(value, raw);
}

// dpre of one row's 8 columns, from dy.
template <DType kDType>
__device__ __forceinline__ void back(float (&value)[kVector], const ActivationBackwardParams& p,
                                     int64_t at) {
  float pre[kVector];
  load_row<kDType>(pre, p.pre + at);
  with_activation(p.activation, [&](const auto& formula) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[e] *= formula.slope(pre[e]);
  });
  RawVector<kVector> raw;
  narrow<kDType>(raw, value);
  store_raw<2>(reinterpret_cast<char*>(p.dpre + at), raw);
}

template <DType kDType>
__global__ void __launch_bounds__(kThreads)
    activation_bwd_kernel(const ActivationBackwardParams p) {
  auto& smem = dynamic_smem<WarpSums>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int own = static_cast<int>(threadIdx.x) % kWarpSize * kVector;
  const int first = static_cast<int>(blockIdx.x) * kActivationColumns, column = first + own;
  float sum[kVector] = {};
  for (int64_t row = blockIdx.y * kActivationRows + warp; row < p.M && column < p.N;
       row += int64_t{p.strips} * kActivationRows) {
    float value[kVector];
    load_row<kDType>(value, p.dy + row * p.dy_stride + column);
    if (p.pre != nullptr) back<kDType>(value, p, row * p.N + column);
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] += value[e];
  }
  if (p.partial == nullptr) return;
  store_floats<kVector>(smem.row[warp], own, sum);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (first + thread >= p.N) return;
  float all = 0.0f;
#pragma unroll
  for (int w = 0; w < kActivationRows; ++w) all += smem.row[w][thread];
  p.partial[int64_t{blockIdx.y} * p.N + first + thread] = all;
}

template <DType kDType>
__global__ void __launch_bounds__(kPartThreads* kWarpSize)
    column_sums_kernel(const ColumnSumsParams p) {
  auto& smem = dynamic_smem<PartSums>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int part = static_cast<int>(threadIdx.x) / kWarpSize;
  const int column = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  for (int strip = part; strip < p.strips && column < p.N; strip += kPartThreads) {
    sum += p.partial[int64_t{strip} * p.N + column];
  }
  smem.part[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= p.N) return;
#pragma unroll
  for (int i = 1; i < kPartThreads; ++i) sum += smem.part[i][lane];
  RawVector<1> raw{{narrow_pair<kDType>(sum, 0.0f)}};
  store_raw<2>(reinterpret_cast<char*>(p.out + column), raw);
}

template <DType kDType>
Status launch_activation(const ActivationBackwardParams& p, Stream stream) {
  const unsigned columns = (p.N + kActivationColumns - 1) / kActivationColumns;
  const LaunchConfig config{dim3(columns, static_cast<unsigned>(p.strips)), dim3(kThreads),
                            sizeof(WarpSums), stream};
  return launch(activation_bwd_kernel<kDType>, config, p);
}

template <DType kDType>
Status launch_sums(const ColumnSumsParams& p, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>((p.N + kWarpSize - 1) / kWarpSize)),
                            dim3(kPartThreads * kWarpSize), sizeof(PartSums), stream};
  return launch(column_sums_kernel<kDType>, config, p);
}

}  // namespace

Status activation_bwd(const ActivationBackwardParams& params, DType dtype, Stream stream) {
  return dtype == DType::kBFloat16 ? launch_activation<DType::kBFloat16>(params, stream)
                                   : launch_activation<DType::kFloat16>(params, stream);
}

Status column_sums(const ColumnSumsParams& params, DType dtype, Stream stream) {
  return dtype == DType::kBFloat16 ? launch_sums<DType::kBFloat16>(params, stream)
                                   : launch_sums<DType::kFloat16>(params, stream);
}

}  // namespace fused_lm
