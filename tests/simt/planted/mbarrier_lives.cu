// Mistakes with an mbarrier's life: used after its end, stored over, its phase seen by nobody.
#include "planted/case.h"
#include "ptx/cp_async.h"
#include "ptx/mbarrier.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64;
struct Pipeline {
  float tile[2][4 * kThreads];
  uint64_t full[2];
};
constexpr size_t kPipeline = sizeof(Pipeline);

// A lazy copy arrives when nobody can go on without it: no thread is running then.
template <bool kBug>
__global__ void copy_arrives_after_the_end(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  if (thread < 2) ptx::mbarrier_init(&smem.full[thread], kThreads);
  __syncthreads();
  const auto copy = [&](int tile) {
    ptx::cp_async_16(&smem.tile[tile][4 * thread], &gIn[4 * thread]);
    // BUG(plain,race,asan): no mbarrier was initialised
    ptx::mbarrier_arrive_cp_async(&smem.full[tile]);
  };
  copy(0);
  float first = 0.0f;
  if constexpr (kBug) {
    __syncthreads();
    if (thread == 0) ptx::mbarrier_invalidate(&smem.full[0]);
  } else {
    ptx::mbarrier_wait(&smem.full[0], 0);
    first = smem.tile[0][4 * (63 - thread)];
  }
  copy(1);
  ptx::mbarrier_wait(&smem.full[1], 0);
  gOut[thread] = first + smem.tile[1][4 * (63 - thread)];
}
PLANT(copy_arrives_after_the_end, kThreads, kPipeline);

// Its bytes serve something else at the end, as those of a pipeline may.
template <bool kBug>
__global__ void stored_over_a_live_mbarrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  // BUG(plain,race,asan): block ended: the live mbarrier at .* was written over
  if (thread == 0) ptx::mbarrier_init(&smem.full[0], kThreads);
  __syncthreads();
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  const float other = smem.tile[0][63 - thread];
  __syncthreads();
  if (thread == 0) {
    if constexpr (!kBug) ptx::mbarrier_invalidate(&smem.full[0]);
    smem.full[0] = 5;
  }
  __syncthreads();
  gOut[thread] = other + static_cast<float>(smem.full[0]);
}
PLANT(stored_over_a_live_mbarrier, kThreads, kPipeline);

template <bool kBug>
__global__ void mbarrier_used_after_a_store(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(&smem.full[0], kThreads);
    if constexpr (kBug) smem.full[0] = 5;
  }
  __syncthreads();
  smem.tile[0][thread] = gIn[thread];
  // BUG(plain,race,asan): mbarrier arrive at .*the live mbarrier at .* was written over
  ptx::mbarrier_arrive(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(mbarrier_used_after_a_store, kThreads, kPipeline);

// The copies may be on their way when the block ends.
template <bool kBug>
__global__ void phase_of_copies_not_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  if (thread == 0) ptx::mbarrier_init(&smem.full[0], kThreads);
  __syncthreads();
  // BUG(plain,race,asan): a cp.async whose mbarrier nobody waited for
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  ptx::mbarrier_arrive_cp_async(&smem.full[0]);
  if constexpr (!kBug) ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = kBug ? gIn[thread] : smem.tile[0][4 * (63 - thread)];
}
PLANT(phase_of_copies_not_waited_for, kThreads, kPipeline);

}  // namespace
}  // namespace planted
