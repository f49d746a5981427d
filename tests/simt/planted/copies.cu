// Mistakes with cp.async.
#include "planted/case.h"
#include "ptx/cp_async.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 32;
constexpr int kTile = 4 * kThreads;  // 16 bytes per thread
struct Stages {
  float tile[3][kTile];
};
constexpr size_t kStages = sizeof(Stages);

__device__ __forceinline__ float sum4(const float* s) { return s[0] + s[1] + s[2] + s[3]; }

template <bool kBug>
__global__ void copy_not_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x]);
  ptx::cp_async_commit();
  if constexpr (!kBug) ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = mine[2];  // BUG(race): not ordered before it .*cp.async of thread
}
PLANT(copy_not_waited_for, kThreads, kStages);

template <bool kBug>
__global__ void wait_for_one_too_few(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  const int at = 4 * threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(&smem.tile[stage][at], &gIn[stage * kTile + at]);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kBug ? 1 : 0>();
  gOut[threadIdx.x] = smem.tile[0][at] + smem.tile[1][at + 1];  // BUG(race): not ordered before
}
PLANT(wait_for_one_too_few, kThreads, kStages);

template <bool kBug>
__global__ void copy_not_committed(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  // BUG(plain,asan): never committed
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x]);
  if constexpr (!kBug) ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);  // BUG(race): not ordered before it .*cp.async of thread
}
PLANT(copy_not_committed, kThreads, kStages);

template <bool kBug>
__global__ void copy_read_by_others(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  const int thread = threadIdx.x;
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if constexpr (!kBug) __syncthreads();
  gOut[thread] = smem.tile[0][4 * (31 - thread)];  // BUG(race): (not ordered|uninitialised)
}
PLANT(copy_read_by_others, kThreads, kStages);

// The wait makes a thread's own copies visible to itself: the barrier must come after it.
template <bool kBug>
__global__ void barrier_before_the_wait(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  const int thread = threadIdx.x;
  ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread]);
  ptx::cp_async_commit();
  if constexpr (kBug) __syncthreads();
  ptx::cp_async_wait<0>();
  if constexpr (!kBug) __syncthreads();
  gOut[thread] = smem.tile[0][4 * (31 - thread)];  // BUG(race): not ordered before it
}
PLANT(barrier_before_the_wait, kThreads, kStages);

// A ring of stages: tile t + 1 is on its way while t is read.
template <bool kBug>
__global__ void stage_overwritten_while_read(const float* gIn, float* gOut) {
  constexpr int kTiles = 6, kRing = kBug ? 1 : 2;
  auto& smem = dynamic_smem<Stages>();
  const int thread = threadIdx.x;
  const auto load = [&](int tile) {
    const int stage = tile % kRing;
    // BUG(race): race
    if (tile < kTiles) ptx::cp_async_16(&smem.tile[stage][4 * thread], &gIn[tile * 8 + 4 * thread]);
    ptx::cp_async_commit();
  };
  float sum = 0.0f;
  load(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    if constexpr (kRing == 2) load(tile + 1);
    ptx::cp_async_wait<kRing - 1>();
    __syncthreads();
    sum += sum4(&smem.tile[tile % kRing][4 * (31 - thread)]);
    if constexpr (kRing == 1) load(tile + 1);
    if constexpr (kRing == 2) __syncthreads();
  }
  gOut[thread] = sum;
}
PLANT(stage_overwritten_while_read, kThreads, kStages);

// With three stages one barrier per tile is enough: what is loaded was read before it.
template <bool kBug>
__global__ void prefetch_into_the_live_stage(const float* gIn, float* gOut) {
  constexpr int kTiles = 7, kRing = 3;
  auto& smem = dynamic_smem<Stages>();
  const int thread = threadIdx.x;
  const auto load = [&](int tile) {
    const int stage = (kBug && tile >= 2 ? tile + 1 : tile) % kRing;
    if (tile < kTiles) {
      // BUG(race): race
      ptx::cp_async_16(&smem.tile[stage][4 * thread], &gIn[8 * tile + 4 * thread]);
    }
    ptx::cp_async_commit();
  };
  float sum = 0.0f;
  load(0);
  load(1);
  for (int tile = 0; tile < kTiles; ++tile) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    sum += sum4(&smem.tile[tile % kRing][4 * (31 - thread)]);
    load(tile + 2);
  }
  gOut[thread] = sum;
}
PLANT(prefetch_into_the_live_stage, kThreads, kStages);

template <bool kBug>
__global__ void store_into_a_copy_in_flight(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x]);
  ptx::cp_async_commit();
  if constexpr (!kBug) ptx::cp_async_wait<0>();
  mine[1] = 0.0f;  // BUG(race): two writes without an order
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(store_into_a_copy_in_flight, kThreads, kStages);

template <bool kBug>
__global__ void two_copies_to_one_place(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x]);
  ptx::cp_async_commit();
  if constexpr (!kBug) ptx::cp_async_wait<0>();
  ptx::cp_async_16(mine, &gIn[128 + 4 * threadIdx.x]);  // BUG(race): two writes without an order
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(two_copies_to_one_place, kThreads, kStages);

template <bool kBug>
__global__ void copy_over_what_is_read(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  const int thread = threadIdx.x;
  smem.tile[0][thread] = gIn[thread];
  __syncthreads();
  const float other = smem.tile[0][31 - thread];
  if constexpr (!kBug) __syncthreads();
  // BUG(race): race
  if (thread < 8) ptx::cp_async_16(&smem.tile[0][4 * thread], &gIn[4 * thread + 64]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  gOut[thread] = other + smem.tile[0][31 - thread];
}
PLANT(copy_over_what_is_read, kThreads, kStages);

template <bool kBug>
__global__ void copy_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  // BUG(plain,race,asan): 16 bytes to 0x\w+ from .* are not aligned
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x + (kBug ? 1 : 0)]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(copy_not_aligned, kThreads, kStages);

template <bool kBug>
__global__ void copy_to_a_place_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][2 * threadIdx.x + (kBug ? 1 : 0)];
  // BUG(plain,race,asan): 8 bytes to 0x\w+ from .* are not aligned
  ptx::cp_async_small<8>(mine, &gIn[2 * threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = mine[0] + mine[1];
}
PLANT(copy_to_a_place_not_aligned, kThreads, kStages);

// The last thread's tile is half outside: the rest must be zeros that nobody reads.
template <bool kBug>
__global__ void copy_from_behind_the_end(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  const int first = kInputs - kTile + 4 + 4 * static_cast<int>(threadIdx.x);
  float* mine = &smem.tile[0][4 * threadIdx.x];
  const int bytes = kBug || first < kInputs ? 16 : 0;
  // BUG(plain,race,asan): cp.async at .*: 16 bytes at .* are outside of every allocation
  ptx::cp_async_16(mine, &gIn[first], bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(copy_from_behind_the_end, kThreads, kStages);

template <bool kBug>
__global__ void copy_to_behind_shared_memory(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[kBug ? 2 : 1][4 * threadIdx.x] + kTile - 4;
  // BUG(plain,race,asan): (cp.async at .*outside of the block's)
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(copy_to_behind_shared_memory, kThreads, kStages);

template <bool kBug>
__global__ void copy_of_too_many_source_bytes(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  float* mine = &smem.tile[0][4 * threadIdx.x];
  // BUG(plain,race,asan): 32 source bytes of 16
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x], kBug ? 32 : 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = sum4(mine);
}
PLANT(copy_of_too_many_source_bytes, kThreads, kStages);

template <bool kBug>
__global__ void copy_in_flight_at_the_end(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Stages>();
  // BUG(plain,race,asan): nobody waited for
  ptx::cp_async_16(&smem.tile[0][4 * threadIdx.x], &gIn[4 * threadIdx.x]);
  ptx::cp_async_commit();
  gOut[threadIdx.x] = gIn[threadIdx.x];
  if constexpr (!kBug) ptx::cp_async_wait<0>();
}
PLANT(copy_in_flight_at_the_end, kThreads, kStages);

}  // namespace
}  // namespace planted
