// Mistakes with mbarriers.
#include "planted/case.h"
#include "ptx/barrier.h"
#include "ptx/cp_async.h"
#include "ptx/mbarrier.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64;
struct Pipeline {
  float tile[2][4 * kThreads];
  uint64_t full[2], empty[2];
};
constexpr size_t kPipeline = sizeof(Pipeline);

__device__ __forceinline__ void init_one(uint64_t* barrier, uint32_t arrivals) {
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, arrivals);
  __syncthreads();
}

template <bool kBug>
__global__ void wait_for_the_wrong_parity(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  // BUG(plain,asan): deadlock .*mbarrier wait at .*parity 1 \(phase 1, 64 of 64
  ptx::mbarrier_wait(&smem.full[0], kBug ? 1 : 0);
  gOut[thread] = smem.tile[0][63 - thread];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(wait_for_the_wrong_parity, kThreads, kPipeline);

template <bool kBug>
__global__ void arrival_missing(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  smem.tile[0][thread] = gIn[thread];
  if (!kBug || thread != 7) ptx::mbarrier_arrive(&smem.full[0]);
  // BUG(plain,race,asan): deadlock .*mbarrier wait at .*parity 0 \(phase 0, 1 of 64 arrivals
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(arrival_missing, kThreads, kPipeline);

// A phase that ends after one warp's arrivals leaves those of the other to the next phase.
template <bool kBug>
__global__ void arrivals_counted_too_low(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kBug ? 32 : 64);
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(arrivals_counted_too_low, kThreads, kPipeline);

template <bool kBug>
__global__ void init_not_seen_by_all(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  if (thread == 0) ptx::mbarrier_init(&smem.full[0], kThreads);
  if constexpr (!kBug) __syncthreads();
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);  // BUG(race): (not ordered before it|uninitialised)
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(init_not_seen_by_all, kThreads, kPipeline);

template <bool kBug>
__global__ void mbarrier_without_init(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  if constexpr (!kBug) init_one(&smem.full[1], kThreads);
  smem.tile[0][thread] = gIn[thread];
  // BUG(plain,asan): no mbarrier was initialised
  // BUG(race): (no mbarrier was initialised|uninitialised shared memory)
  ptx::mbarrier_arrive(&smem.full[1]);
  ptx::mbarrier_wait(&smem.full[1], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(mbarrier_without_init, kThreads, kPipeline);

template <bool kBug>
__global__ void wait_without_init(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  // BUG(plain,asan): mbarrier wait at .*no mbarrier was initialised
  // BUG(race): (no mbarrier was initialised|uninitialised shared memory)
  ptx::mbarrier_wait(&smem.full[kBug ? 1 : 0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(wait_without_init, kThreads, kPipeline);

template <bool kBug>
__global__ void init_twice(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    // BUG(plain,race,asan): one lives at smem\+0x\w+ already
    if (thread == 0) ptx::mbarrier_init(&smem.full[0], kThreads);
    __syncthreads();
    smem.tile[0][thread] = gIn[thread + round];
    ptx::mbarrier_arrive(&smem.full[0]);
    ptx::mbarrier_wait(&smem.full[0], 0);
    sum += smem.tile[0][63 - thread];
    __syncthreads();
    if (!kBug && thread == 0) ptx::mbarrier_invalidate(&smem.full[0]);
  }
  gOut[thread] = sum;
}
PLANT(init_twice, kThreads, kPipeline);

template <bool kBug>
__global__ void init_of_no_arrivals(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  // BUG(plain,race,asan): mbarrier init at .*: 0 arrivals
  if (thread == 0) ptx::mbarrier_init(&smem.full[0], kBug ? 0 : kThreads);
  __syncthreads();
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(init_of_no_arrivals, kThreads, kPipeline);

template <bool kBug>
__global__ void mbarrier_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  auto* barrier = reinterpret_cast<uint64_t*>(&smem.tile[1][kBug ? 1 : 2]);
  // BUG(plain,race,asan): is not 8-byte aligned
  if (thread == 0) ptx::mbarrier_init(barrier, kThreads);
  __syncthreads();
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
  gOut[thread] = smem.tile[0][63 - thread];
}
PLANT(mbarrier_not_aligned, kThreads, kPipeline);

// One arrival more than the phase has falls to the next phase.
template <bool kBug>
__global__ void one_arrival_too_many(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];
  // BUG(plain,race,asan): block ended with 1 of 64 arrivals in a phase of the mbarrier
  if (kBug && thread == 5) ptx::mbarrier_arrive(&smem.full[0]);
}
PLANT(one_arrival_too_many, kThreads, kPipeline);

// The second phase ends without asking whether the first was seen.
template <bool kBug>
__global__ void phase_that_is_over_too_soon(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], 32);
  if (thread < 32) {
    for (int round = 0; round < 2; ++round) {
      smem.tile[round][thread] = gIn[thread + round];
      ptx::mbarrier_arrive(&smem.full[0]);
      if (!kBug && round == 0) ptx::named_barrier_sync(1, 64);
    }
    gOut[thread] = gIn[thread];
  } else {
    // BUG(plain,race,asan): (two phases ended before|deadlock .*parity 0 \(phase 2)
    ptx::mbarrier_wait(&smem.full[0], 0);
    const float first = smem.tile[0][63 - thread];
    if constexpr (!kBug) ptx::named_barrier_sync(1, 64);
    ptx::mbarrier_wait(&smem.full[0], 1);
    gOut[thread] = first + smem.tile[1][63 - thread];
  }
}
PLANT(phase_that_is_over_too_soon, kThreads, kPipeline);

template <bool kBug>
__global__ void mbarrier_wait_missing(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  smem.tile[0][thread] = gIn[thread];
  ptx::mbarrier_arrive(&smem.full[0]);
  if constexpr (!kBug) ptx::mbarrier_wait(&smem.full[0], 0);
  gOut[thread] = smem.tile[0][63 - thread];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(mbarrier_wait_missing, kThreads, kPipeline);

template <bool kBug>
__global__ void copies_not_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  ptx::mbarrier_arrive_cp_async(&smem.full[0]);
  if constexpr (!kBug) ptx::mbarrier_wait(&smem.full[0], 0);
  // BUG(race): (not ordered before it .*cp.async of thread|uninitialised)
  gOut[thread] = smem.tile[0][4 * (63 - thread)];
}
PLANT(copies_not_waited_for, kThreads, kPipeline);

// The arrival counts the copies before it, and no later one.
template <bool kBug>
__global__ void arrival_before_its_copy(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  if constexpr (kBug) ptx::mbarrier_arrive_cp_async(&smem.full[0]);
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  if constexpr (!kBug) ptx::mbarrier_arrive_cp_async(&smem.full[0]);
  ptx::mbarrier_wait(&smem.full[0], 0);
  // BUG(race): (not ordered before it .*cp.async of thread|uninitialised)
  gOut[thread] = smem.tile[0][4 * (63 - thread)];
}
PLANT(arrival_before_its_copy, kThreads, kPipeline);

// mbarrier.arrive says nothing about copies in flight.
template <bool kBug>
__global__ void plain_arrival_for_a_copy(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Pipeline>();
  const int thread = threadIdx.x;
  init_one(&smem.full[0], kThreads);
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  if constexpr (kBug) {
    ptx::mbarrier_arrive(&smem.full[0]);
  } else {
    ptx::mbarrier_arrive_cp_async(&smem.full[0]);
  }
  ptx::mbarrier_wait(&smem.full[0], 0);
  // BUG(race): not ordered before it .*cp.async of thread
  gOut[thread] = smem.tile[0][4 * (63 - thread)];
}
PLANT(plain_arrival_for_a_copy, kThreads, kPipeline);

// Warp 0 fills two stages in turn, warp 1 empties them.
template <bool kBug>
__global__ void producer_ignores_empty(const float* gIn, float* gOut) {
  constexpr int kTiles = 5;
  auto& smem = dynamic_smem<Pipeline>();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    ptx::mbarrier_init(&smem.full[threadIdx.x], 32);
    ptx::mbarrier_init(&smem.empty[threadIdx.x], 32);
  }
  __syncthreads();
  float sum = 0.0f;
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % 2, round = tile / 2;
    if (threadIdx.x < 32) {
      if (!kBug && round > 0) ptx::mbarrier_wait(&smem.empty[stage], (round - 1) & 1);
      // BUG(race): race
      ptx::cp_async_16(&smem.tile[stage][4 * lane], &gIn[tile * 16 + 4 * lane]);
      ptx::mbarrier_arrive_cp_async(&smem.full[stage]);
    } else {
      ptx::mbarrier_wait(&smem.full[stage], round & 1);
      sum += smem.tile[stage][4 * (31 - lane)];
      ptx::mbarrier_arrive(&smem.empty[stage]);
    }
  }
  gOut[threadIdx.x] = sum;
}
PLANT(producer_ignores_empty, kThreads, kPipeline);

}  // namespace
}  // namespace planted
