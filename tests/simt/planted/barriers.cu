// Mistakes with the barriers of a block and of a warp.
#include "planted/case.h"
#include "ptx/barrier.h"

namespace planted {
namespace {

using namespace fused_lm;

struct Slots {
  float value[128];
};
constexpr size_t kSlots = sizeof(Slots);

template <bool kBug>
__global__ void read_before_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  if constexpr (!kBug) __syncthreads();
  gOut[thread] = smem.value[63 - thread];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(read_before_barrier, 64, kSlots);

template <bool kBug>
__global__ void overwritten_before_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  __syncthreads();
  const float other = smem.value[63 - thread];
  if constexpr (!kBug) __syncthreads();
  smem.value[thread] = 2.0f * other;  // BUG(race): race
  __syncthreads();
  gOut[thread] = smem.value[63 - thread];
}
PLANT(overwritten_before_barrier, 64, kSlots);

template <bool kBug>
__global__ void one_slot_for_all(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  // BUG(race): two writes without an order
  if (kBug || thread == 0) smem.value[0] = gIn[5];
  __syncthreads();
  gOut[thread] = smem.value[0];
}
PLANT(one_slot_for_all, 64, kSlots);

template <bool kBug>
__global__ void missing_syncwarp(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int lane = threadIdx.x;
  smem.value[lane] = gIn[lane];
  if constexpr (!kBug) __syncwarp();
  gOut[lane] = smem.value[lane ^ 1];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(missing_syncwarp, 32, kSlots);

template <bool kBug>
__global__ void syncwarp_of_too_few_lanes(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int lane = threadIdx.x;
  smem.value[lane] = gIn[lane];
  if constexpr (kBug) {
    __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  } else {
    __syncwarp();
  }
  gOut[lane] = smem.value[31 - lane];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(syncwarp_of_too_few_lanes, 32, kSlots);

// A shuffle is no barrier: it orders no memory.
template <bool kBug>
__global__ void shuffle_taken_for_a_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int lane = threadIdx.x;
  smem.value[lane] = gIn[lane];
  const float mine = __shfl_xor_sync(~0u, gIn[lane], 1);
  if constexpr (!kBug) __syncwarp();
  gOut[lane] = mine + smem.value[lane ^ 2];  // BUG(race): not ordered before
}
PLANT(shuffle_taken_for_a_barrier, 32, kSlots);

// Two warps wait for each other, but the value comes from a third.
template <bool kBug>
__global__ void barrier_of_too_few_warps(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  if (kBug && thread < 64) {
    ptx::named_barrier_sync(1, 64);
  } else if (!kBug) {
    ptx::named_barrier_sync(1, 96);
  }
  gOut[thread] = smem.value[95 - thread];  // BUG(race): (not ordered before|uninitialised)
}
PLANT(barrier_of_too_few_warps, 96, kSlots);

template <bool kBug>
__global__ void barrier_of_half_a_warp(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  // BUG(plain,race,asan): 48 threads are no number of whole warps
  ptx::named_barrier_sync(1, kBug ? 48 : 64);
  gOut[thread] = smem.value[63 - thread];
}
PLANT(barrier_of_half_a_warp, 64, kSlots);

template <bool kBug>
__global__ void barrier_counts_differ(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  // BUG(plain,race,asan): barrier 1: \d+ threads at .*, but \d+ at
  ptx::named_barrier_sync(1, kBug && thread / 32 == 1 ? 64 : 96);
  gOut[thread] = smem.value[95 - thread];
}
PLANT(barrier_counts_differ, 96, kSlots);

template <bool kBug>
__global__ void barrier_that_is_none(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  // BUG(plain,race,asan): barrier 16 at .*: there are 16
  ptx::named_barrier_sync(kBug ? 16 : 15, 64);
  gOut[thread] = smem.value[63 - thread];
}
PLANT(barrier_that_is_none, 64, kSlots);

template <bool kBug>
__global__ void barrier_not_reached(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  if (kBug && thread >= 32) return;
  __syncthreads();  // BUG(plain,race,asan): deadlock .*32 of 64 threads have arrived
  gOut[thread] = smem.value[63 - thread];
}
PLANT(barrier_not_reached, 64, kSlots);

// bar.sync is one instruction of a warp: its lanes may not come to it by two ways.
template <bool kBug>
__global__ void barrier_under_divergence(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  if (kBug && thread % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();  // BUG(plain,race,asan): lanes of a warp part
  }
  gOut[thread] = smem.value[63 - thread];
}
PLANT(barrier_under_divergence, 64, kSlots);

template <bool kBug>
__global__ void arrival_left_behind(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  gOut[thread] = gIn[thread];
  if (thread < 32) {
    // BUG(plain,race,asan): block ended with 32 arrivals at barrier 2
    ptx::named_barrier_arrive(2, 64);
  } else if constexpr (!kBug) {
    ptx::named_barrier_sync(2, 64);
  }
}
PLANT(arrival_left_behind, 64);

template <bool kBug>
__global__ void arrival_at_another_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  if (thread < 32) {
    smem.value[thread] = gIn[thread];
    ptx::named_barrier_arrive(kBug ? 3 : 2, 64);
    gOut[thread] = gIn[thread];
  } else {
    ptx::named_barrier_sync(2, 64);  // BUG(plain,race,asan): deadlock .*barrier 2
    gOut[thread] = smem.value[thread - 32];
  }
}
PLANT(arrival_at_another_barrier, 64, kSlots);

// The slots of a second sum may be written only when everybody has read those of the first.
template <bool kBug>
__global__ void slots_used_again(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x, warp = thread / 32;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    if (thread % 32 == 0) smem.value[warp] = gIn[warp + round];  // BUG(race): race
    __syncthreads();
    sum += smem.value[0] + smem.value[1];
    if constexpr (!kBug) __syncthreads();
  }
  gOut[thread] = sum;
}
PLANT(slots_used_again, 64, kSlots);

// A count over the block must survive what smaller barriers do before everybody has read it.
template <bool kBug>
__global__ void votes_of_the_block(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  const int even = __syncthreads_count(thread % 2 == 0);
  float other = smem.value[127 - thread];
  if (thread < 64) {
    other = smem.value[127 - thread];
    ptx::named_barrier_sync(1, 64);
    smem.value[64 + thread] = other;
    ptx::named_barrier_sync(1, 64);
    other += smem.value[127 - thread];
  }
  // BUG(plain,race,asan): deadlock .*barrier 1 at
  if (kBug && thread < 32) ptx::named_barrier_sync(1, 64);
  gOut[thread] = gIn[even] + other;
}
PLANT(votes_of_the_block, 128, kSlots);

}  // namespace
}  // namespace planted
