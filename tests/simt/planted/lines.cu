// Mistakes with bulk copies of lines and with adds to global memory.
#include "planted/case.h"
#include "ptx/barrier.h"
#include "ptx/bulk.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64, kLine = 128;
constexpr uint32_t kLineBytes = kLine * sizeof(float);

struct Lines {
  alignas(16) float line[kLine];
  uint64_t full;
};
constexpr size_t kLines = sizeof(Lines);

__device__ __forceinline__ void start(Lines& smem) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

template <bool kBug>
__global__ void line_not_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  start(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kLineBytes);
    ptx::bulk_load(smem.line, gIn, kLineBytes, &smem.full);
  }
  if (!kBug || threadIdx.x == 0) ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.line[threadIdx.x];  // BUG(race): (not ordered|uninitialised)
}
PLANT(line_not_waited_for, kThreads, kLines);

template <bool kBug>
__global__ void line_longer_than_expected(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  start(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBug ? kLineBytes - 16 : kLineBytes);
    ptx::bulk_load(smem.line, gIn, kLineBytes, &smem.full);
  }
  ptx::mbarrier_wait(&smem.full, 0);  // BUG(plain,race,asan): (bytes|deadlock)
  gOut[threadIdx.x] = smem.line[threadIdx.x];
}
PLANT(line_longer_than_expected, kThreads, kLines);

template <bool kBug>
__global__ void line_that_is_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  start(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kLineBytes);
    // BUG(plain,race,asan): both must be multiples of 16
    ptx::bulk_load(smem.line, gIn + (kBug ? 1 : 4), kLineBytes, &smem.full);
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.line[threadIdx.x];
}
PLANT(line_that_is_not_aligned, kThreads, kLines);

__device__ __forceinline__ void zero(float* gLine) {
  for (int i = threadIdx.x; i < kLine; i += kThreads) gLine[i] = 0.0f;
}

__device__ __forceinline__ void fill(Lines& smem, const float* gIn, float factor) {
  for (int i = threadIdx.x; i < kLine; i += kThreads) smem.line[i] = factor * gIn[i];
}

template <bool kBug>
__global__ void line_added_without_a_fence(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  zero(gOut);
  fill(smem, gIn, 2.0f);
  if constexpr (!kBug) ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_add(gOut, smem.line, kLineBytes);  // BUG(race): written without a proxy fence
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}
PLANT(line_added_without_a_fence, kThreads, kLines, 1, kLine);

template <bool kBug>
__global__ void line_overwritten_while_added(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  zero(gOut);
  for (int i = 0; i < 2; ++i) {
    for (int j = threadIdx.x; j < kLine; j += kThreads) {
      smem.line[j] = gIn[j] + i;  // BUG(race): write to data whose read is not ordered
    }
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::bulk_add(gOut, smem.line, kLineBytes);
      ptx::bulk_commit();
      if (!kBug || i == 1) ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
}
PLANT(line_overwritten_while_added, kThreads, kLines, 1, kLine);

// Blocks may add to one word, and no block may use what another one adds to.
template <bool kBug>
__global__ void block_adds_to_what_another_stores(const float* gIn, float* gOut) {
  const float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  float* gQuads = gOut + 4 * threadIdx.x;
  const int own = 4 * kThreads * blockIdx.x;
  for (int i = 0; i < 4; ++i) gQuads[own + i] = gIn[i];
  const int at = kBug && blockIdx.x == 1 ? 0 : own;
  ptx::add_quad(gQuads + at, values);  // BUG(race): adds to .* another block of the launch uses
}
PLANT(block_adds_to_what_another_stores, kThreads, 0, 2, 8 * kThreads);

// Which float lies where; a line that is added twice, and once.
template <bool kTwice>
__global__ void fragments_of_lines(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Lines>();
  zero(gOut);
  start(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kLineBytes);
    ptx::bulk_load(smem.line, gIn, kLineBytes, &smem.full);
  }
  ptx::mbarrier_wait(&smem.full, 0);
  const int i = 2 * threadIdx.x;
  const float pair[2] = {smem.line[i], smem.line[i + 1]};
  __syncthreads();
  smem.line[i] = 10.0f * pair[0];
  smem.line[i + 1] = 10.0f * pair[1];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int turn = 0; turn < (kTwice ? 2 : 1); ++turn) {
      ptx::bulk_add(gOut, smem.line, kLineBytes);
      ptx::bulk_commit();
    }
    ptx::bulk_wait<0>();
  }
}
PLANT(fragments_of_lines, kThreads, kLines, 1, kLine);

}  // namespace
}  // namespace planted
