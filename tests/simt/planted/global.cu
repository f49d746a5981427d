// Mistakes with global memory inside of a block, with atomics, and with the C library's copies.
#include <cstring>

#include "planted/case.h"
#include "ptx/cp_async.h"

namespace planted {
namespace {

using namespace fused_lm;

struct Slots {
  alignas(16) float value[128];
  int counter;
};
constexpr size_t kSlots = sizeof(Slots);

// What the compiler can't know: a call of the C library stays one.
__device__ __forceinline__ int known_at_run_time(const float* gIn, int value) {
  constexpr float kHuge = 1e9f;
  return gIn[0] > kHuge ? 0 : value;
}

template <bool kBug>
__global__ void global_read_before_barrier(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  if (thread < 32) gOut[thread] = gIn[thread];
  if constexpr (!kBug) __syncthreads();
  // BUG(race): \(race\): global memory
  if (thread >= 32) gOut[thread] = gOut[63 - thread];
}
PLANT(global_read_before_barrier, 64);

template <bool kBug>
__global__ void two_threads_write_one_word(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  // BUG(race): two writes without an order \(race\): global memory
  gOut[kBug ? thread / 2 : thread] = gIn[thread];
}
PLANT(two_threads_write_one_word, 64);

template <bool kBug>
__global__ void global_overwritten_while_read(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  gOut[thread] = gIn[thread];
  __syncthreads();
  const float other = gOut[63 - thread];
  if constexpr (!kBug) __syncthreads();
  gOut[thread] = 2.0f * other;  // BUG(race): \(race\): global memory
}
PLANT(global_overwritten_while_read, 64);

// A copy may read its source until it is waited for.
template <bool kBug>
__global__ void source_of_a_copy_overwritten(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int first = 4 * threadIdx.x;
  for (int i = 0; i < 4; ++i) gOut[first + i] = gIn[first + i];
  ptx::cp_async_16(&smem.value[first], &gOut[first]);
  ptx::cp_async_commit();
  if constexpr (!kBug) ptx::cp_async_wait<0>();
  // BUG(race): write to data whose read is not ordered before it .*cp.async of thread
  gOut[first] = 0.0f;
  if constexpr (kBug) ptx::cp_async_wait<0>();
  gOut[first + 1] = smem.value[first];
}
PLANT(source_of_a_copy_overwritten, 32, kSlots, 1, 128);

template <bool kBug>
__global__ void atomic_behind_the_end(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  gOut[thread] = gIn[thread];
  // BUG(race): global atomic of 4 bytes out of bounds
  // BUG(asan): use-after-poison
  atomicAdd(&gOut[kBug ? thread + 1 : thread], 1.0f);
}
PLANT(atomic_behind_the_end, 64);

template <bool kBug>
__global__ void atomic_on_what_nobody_wrote(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  if (!kBug && threadIdx.x == 0) smem.counter = 0;
  __syncthreads();
  atomicAdd(&smem.counter, 1);  // BUG(race): read of uninitialised shared memory
  __syncthreads();
  gOut[threadIdx.x] = static_cast<float>(smem.counter);
}
PLANT(atomic_on_what_nobody_wrote, 64, kSlots);

template <bool kBug>
__global__ void atomic_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  if (threadIdx.x < 2) smem.value[threadIdx.x] = 0.0f;
  __syncthreads();
  char* address = reinterpret_cast<char*>(smem.value) + known_at_run_time(gIn, kBug ? 2 : 0);
  // BUG(race): misaligned 4-byte shared access
  atomicAdd(reinterpret_cast<uint32_t*>(address), 1u);
  __syncthreads();
  gOut[threadIdx.x] = static_cast<float>(__float_as_uint(smem.value[0]));
}
PLANT(atomic_not_aligned, 64, kSlots);

template <bool kBug>
__global__ void memcpy_before_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  memcpy(&smem.value[4 * thread], &gIn[4 * thread], known_at_run_time(gIn, 16));
  if constexpr (!kBug) __syncthreads();
  gOut[thread] = smem.value[4 * (31 - thread)];  // BUG(race): (not ordered|uninitialised)
}
PLANT(memcpy_before_barrier, 32, kSlots);

template <bool kBug>
__global__ void memset_behind_the_end(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  // BUG(race): global write of 8 bytes out of bounds
  // BUG(asan): use-after-poison
  memset(&gOut[2 * thread + (kBug ? 1 : 0)], 0, known_at_run_time(gIn, 8));
}
PLANT(memset_behind_the_end, 32, 0, 1, 64);

}  // namespace
}  // namespace planted
