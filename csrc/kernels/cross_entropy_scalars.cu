// The small kernels around cross_entropy_rows.cu: counts, sums and a factor.
//
// loss_inverse_count, loss_reduce: one block that adds in a fixed order, each thread its rows and
// then the block by shuffles: 1 / number of rows that count, before the rows' kernel, and the loss
// of all of them, after it. Nothing is copied to the host. Bytes: N t read of targets of t bytes (a
// sum needs none), 4 N of losses; 4 written.
//
// scale_rows: a finished gradient times dloss, in place, a block per row. A dloss of 1, as
// loss.backward() sends it, costs a launch and no traffic; another one 2 V b per row of V elements
// of b bytes. 4 bytes of dloss per thread.
//
// | barrier | who           | why                                     |
// | 0       | one block's   | slots are read after they are written   |
// |         | all threads   |                                         |
#include "kernels/cross_entropy.h"
#include "kernels/cross_entropy_row.h"
#include "kernels/cross_entropy_tuning.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

constexpr int kReduceThreads = 1024;
constexpr int kReduceUnroll = 4;  // loads under way, of a thread
constexpr int kScaleThreads = 256;

struct ReduceShared {
  float sums[kReduceThreads / kWarpSize];
  int counts[kReduceThreads / kWarpSize];
};
static_assert(sizeof(ReduceShared) == 256);

template <class Number>
__device__ __forceinline__ Number add_lanes(Number value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// What all threads of the block have counted and added, in every thread.
__device__ __forceinline__ void add_threads(float& sum, int& count, ReduceShared& shared) {
  static_assert(kReduceThreads == kWarpSize * kWarpSize, "a lane for every warp");
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  sum = add_lanes(sum);
  count = add_lanes(count);
  if (lane == 0) {
    shared.sums[warp] = sum;
    shared.counts[warp] = count;
  }
  __syncthreads();
  sum = add_lanes(shared.sums[lane]);
  count = add_lanes(shared.counts[lane]);
}

__device__ __forceinline__ int rows_that_count(const Targets& targets, int64_t N) {
  int count = 0;
  with_targets(targets, [&](const auto* classes) {
#pragma unroll kReduceUnroll
    for (int64_t row = threadIdx.x; row < N; row += kReduceThreads) {
      count += classes[row] != targets.ignore_index ? 1 : 0;
    }
  });
  return count;
}

__global__ void __launch_bounds__(kReduceThreads, 1)
    loss_inverse_count(const Targets targets, int64_t N, float* inverse_count) {
  auto& shared = dynamic_smem<ReduceShared>();
  float sum = 0.0f;
  int count = rows_that_count(targets, N);
  add_threads(sum, count, shared);
  if (threadIdx.x == 0) *inverse_count = 1.0f / static_cast<float>(max(count, 1));
}

__global__ void __launch_bounds__(kReduceThreads, 1)
    loss_reduce(const float* loss, const Targets targets, int64_t N, bool mean, float* total) {
  auto& shared = dynamic_smem<ReduceShared>();
  float sum = 0.0f;
  int count = mean ? rows_that_count(targets, N) : 0;
#pragma unroll kReduceUnroll
  for (int64_t row = threadIdx.x; row < N; row += kReduceThreads) sum += loss[row];
  add_threads(sum, count, shared);
  if (threadIdx.x != 0) return;
  *total = !mean ? sum : count > 0 ? sum / static_cast<float>(count) : NAN;
}

template <DType kDType, int kVec>
__device__ __forceinline__ void scale_in_place(char* p, float factor) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  RawVector<kVec> raw;
  float value[kVec];
  load_raw<kBytes, LoadPolicy::kCached>(raw, p);
  widen<kDType>(value, raw);
#pragma unroll
  for (int e = 0; e < kVec; ++e) value[e] *= factor;
  narrow<kDType>(raw, value);
  store_raw<kBytes>(p, raw);
}

template <DType kDType>
__global__ void __launch_bounds__(kScaleThreads, 4) loss_scale_rows(const ScaleRowsParams p) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  const int64_t row = blockIdx.x;
  const float factor = p.factor[row * p.factor_stride];
  if (factor == 1.0f) return;
  char* gRow = address_of<kBytes>(p.rows, row * p.V);
  const RowSplit<kBytes> split(gRow, static_cast<int>(p.V));
  const int thread = static_cast<int>(threadIdx.x);
  char* gFirst = gRow + split.head * kBytes;
#pragma unroll 4
  for (int i = thread; i < split.vectors; i += kScaleThreads) {
    scale_in_place<kDType, Logit<kDType>::kVec>(gFirst + static_cast<int64_t>(i) * kLossVectorBytes,
                                                factor);
  }
  if (thread < split.edges) {
    scale_in_place<kDType, 1>(address_of<kBytes>(gRow, split.edge_column(thread)), factor);
  }
}

}  // namespace

Status cross_entropy_inverse_count(const Targets& targets, int64_t N, float* inverse_count,
                                   Stream stream) {
  return launch(loss_inverse_count, {dim3(1), dim3(kReduceThreads), sizeof(ReduceShared), stream},
                targets, N, inverse_count);
}

Status cross_entropy_reduce(const float* loss, const Targets& targets, int64_t N, bool mean,
                            float* total, Stream stream) {
  return launch(loss_reduce, {dim3(1), dim3(kReduceThreads), sizeof(ReduceShared), stream}, loss,
                targets, N, mean, total);
}

Status scale_rows(const ScaleRowsParams& p, Stream stream) {
  if (p.N == 0) return kOk;
  const LaunchConfig config{dim3(static_cast<unsigned>(p.N)), dim3(kScaleThreads), 0, stream};
  switch (p.dtype) {
    case DType::kFloat32: return launch(loss_scale_rows<DType::kFloat32>, config, p);
    case DType::kFloat16: return launch(loss_scale_rows<DType::kFloat16>, config, p);
    case DType::kBFloat16: break;
  }
  return launch(loss_scale_rows<DType::kBFloat16>, config, p);
}

}  // namespace fused_lm
