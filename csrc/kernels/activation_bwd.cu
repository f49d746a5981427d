// Back through an activation where no product's epilogue does it, or through dropout, and sums over
// rows.
//
// activation_bwd: dpre = dy act'(pre), and of every strip of rows the sums of dpre, before it is
// rounded. Grid (256 columns, strip). A warp has a row, a lane 8 of its columns: 16 bytes. Rows of
// a strip are `strips` apart, 8 at a time. Bytes: 4 M N read, 2 M N written; 2 M N read where there
// is no activation; gated 6 M N and 4 M N; through dropout 2 M N (4 of fp32) and 2 M N. The warps'
// sums meet in shared memory, in the order of the warps.
//
// column_sums: adds the strips, 8 threads per column and then those, always in one order: results
// repeat.
#include "kernels/activation_bwd.h"
#include "kernels/activation_row.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

constexpr int kThreads = kActivationRows * kWarpSize;
constexpr int kPartThreads = 8;  // per column of column_sums

struct WarpSums {
  alignas(16) float row[kActivationRows][kActivationColumns];
};

struct PartSums {
  float part[kPartThreads][kWarpSize];
};

// kGated: dgate and dvalue of each dy.
template <DType kDType, bool kGated>
__global__ void __launch_bounds__(kThreads)
    activation_bwd_kernel(const ActivationBackwardParams p) {
  constexpr int kParts = kGated ? 2 : 1;
  auto& smem = dynamic_smem<WarpSums>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int own = static_cast<int>(threadIdx.x) % kWarpSize * kActivationVector;
  const int first = static_cast<int>(blockIdx.x) * kActivationColumns, column = first + own;
  ActivationRow sums[kParts] = {};
  for (int64_t row = blockIdx.y * kActivationRows + warp; row < p.M && column < p.N;
       row += int64_t{p.strips} * kActivationRows) {
    ActivationRow value[kParts];
    const int64_t dy_at = row * p.dy_stride + column, at = row * kParts * p.N + column;
    if constexpr (kGated) {
      load_activation_row<kDType>(value[0], static_cast<const uint16_t*>(p.dy) + dy_at);
      gated_back<kDType>(value, p.activation, p.pre + at, p.dpre + at, p.N);
    } else if (p.pre != nullptr) {
      load_activation_row<kDType>(value[0], static_cast<const uint16_t*>(p.dy) + dy_at);
      activation_back<kDType>(value[0], p.activation, p.pre + at, p.dpre + at);
    } else {
      const DType dtype = p.dy_is_wide ? DType::kFloat32 : kDType;
      RawParameter<kActivationVector> raw;
      load_parameter(raw, p.dy, dtype, dy_at);
      widen_parameter(value[0], raw, dtype);
      if (p.dropout.rng != nullptr) drop_row(value[0], p.dropout, row, column);
      if (p.dpre != nullptr) store_activation_row<kDType>(p.dpre + at, value[0]);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int e = 0; e < kActivationVector; ++e) sums[part][e] += value[part][e];
    }
  }
  if (p.partial == nullptr) return;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part > 0) __syncthreads();
    store_floats<kActivationVector>(smem.row[warp], own, sums[part]);
    __syncthreads();
    if (first + thread >= p.N) continue;
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kActivationRows; ++w) all += smem.row[w][thread];
    p.partial[(int64_t{blockIdx.y} * kParts + part) * p.N + first + thread] = all;
  }
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

template <DType kDType, bool kGated>
Status launch_activation(const ActivationBackwardParams& p, Stream stream) {
  const unsigned columns = (p.N + kActivationColumns - 1) / kActivationColumns;
  const LaunchConfig config{dim3(columns, static_cast<unsigned>(p.strips)), dim3(kThreads),
                            sizeof(WarpSums), stream};
  return launch(activation_bwd_kernel<kDType, kGated>, config, p);
}

template <DType kDType>
Status launch_sums(const ColumnSumsParams& p, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>((p.N + kWarpSize - 1) / kWarpSize)),
                            dim3(kPartThreads * kWarpSize), sizeof(PartSums), stream};
  return launch(column_sums_kernel<kDType>, config, p);
}

}  // namespace

Status activation_bwd(const ActivationBackwardParams& params, DType dtype, Stream stream) {
  constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
  if (params.gated) {
    return dtype == kBf16 ? launch_activation<kBf16, true>(params, stream)
                          : launch_activation<kFp16, true>(params, stream);
  }
  return dtype == kBf16 ? launch_activation<kBf16, false>(params, stream)
                        : launch_activation<kFp16, false>(params, stream);
}

Status column_sums(const ColumnSumsParams& params, DType dtype, Stream stream) {
  return dtype == DType::kBFloat16 ? launch_sums<DType::kBFloat16>(params, stream)
                                   : launch_sums<DType::kFloat16>(params, stream);
}

}  // namespace fused_lm
