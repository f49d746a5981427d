// Mistakes with what barriers count: whole warps, each once in a phase; and threads that spin.
#include "planted/case.h"
#include "ptx/barrier.h"

namespace planted {
namespace {

using namespace fused_lm;

struct Slots {
  float value[64];
  int flag;
};
constexpr size_t kSlots = sizeof(Slots);

// 32 threads, but of two warps: each of them counts as a whole one.
template <bool kBug>
__global__ void barrier_of_two_half_warps(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  gOut[thread] = gIn[thread];
  if (kBug ? thread % 32 < 16 : thread < 32) {
    ptx::named_barrier_sync(1, 32);  // BUG(plain,race,asan): lanes of a warp part: barrier 1
    gOut[thread] = smem.value[31 - thread % 32];
  }
}
PLANT(barrier_of_two_half_warps, 64, kSlots);

template <bool kBug>
__global__ void one_lane_arrives_for_its_warp(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  gOut[thread] = gIn[thread];
  if (thread >= 32) {
    ptx::named_barrier_sync(2, 64);
    gOut[thread] = smem.value[thread - 32];
  } else if (!kBug || thread == 0) {
    const int times = kBug ? 32 : 1;
    // BUG(plain,race,asan): arrives twice before the others have come
    for (int i = 0; i < times; ++i) ptx::named_barrier_arrive(2, 64);
  }
}
PLANT(one_lane_arrives_for_its_warp, 64, kSlots);

// The last warp of this block has 16 lanes, and counts as 32.
template <bool kBug>
__global__ void barrier_that_counts_lanes(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  // BUG(plain,race,asan): 48 threads are no number of whole warps
  ptx::named_barrier_sync(1, kBug ? 48 : 64);
  const float other = smem.value[47 - thread];
  __syncthreads();
  smem.value[thread] = other;
  ptx::named_barrier_sync(0, 64);
  gOut[thread] = smem.value[47 - thread];
}
PLANT(barrier_that_counts_lanes, 48, kSlots);

// Nobody else runs while a thread looks again and again.
template <bool kBug>
__global__ void spins_until_a_store(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  if (thread == 0) smem.flag = 0;
  __syncthreads();
  if (thread == 63) *static_cast<volatile int*>(&smem.flag) = 1;
  if constexpr (kBug) {
    // BUG(race): (the thread spins|not ordered before)
    while (thread != 63 && *static_cast<volatile int*>(&smem.flag) == 0) continue;
  }
  __syncthreads();
  gOut[thread] = static_cast<float>(smem.flag);
}
PLANT(spins_until_a_store, 64, kSlots);

}  // namespace
}  // namespace planted
