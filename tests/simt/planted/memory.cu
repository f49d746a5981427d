// Mistakes with addresses: bounds, alignment, memory that blocks share, undefined behaviour.
#include "planted/case.h"

namespace planted {
namespace {

using namespace fused_lm;

struct Slots {
  alignas(16) float value[64];
};
constexpr size_t kSlots = sizeof(Slots);
constexpr float kHuge = 1e9f;

// What the compiler can't know, so that it leaves the mistake to the run.
__device__ __forceinline__ int known_at_run_time(const float* gIn, int value) {
  return gIn[0] > kHuge ? 0 : value;
}

template <bool kBug>
__global__ void global_read_behind_the_end(const float* gIn, float* gOut) {
  const int at = kInputs - 64 + static_cast<int>(threadIdx.x) + (kBug ? 1 : 0);
  // BUG(race): global read of 4 bytes out of bounds
  // BUG(asan): use-after-poison
  gOut[threadIdx.x] = gIn[at];
}
PLANT(global_read_behind_the_end, 64);

template <bool kBug>
__global__ void global_read_before_the_start(const float* gIn, float* gOut) {
  const int at = static_cast<int>(threadIdx.x) - (kBug ? 4 : 0);
  // BUG(race): global read of 4 bytes out of bounds
  // BUG(asan): use-after-poison
  gOut[threadIdx.x] = gIn[at];
}
PLANT(global_read_before_the_start, 64);

template <bool kBug>
__global__ void global_write_behind_the_end(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  const int rows = kBug ? 64 : 60;
  // BUG(race): global write of 4 bytes out of bounds
  // BUG(asan): use-after-poison
  if (thread < rows) gOut[thread] = gIn[thread];
}
PLANT(global_write_behind_the_end, 64, 0, 1, 60);

// The last vector of a row whose width is no multiple of four.
template <bool kBug>
__global__ void vector_over_the_end(const float* gIn, float* gOut) {
  const int first = 4 * threadIdx.x, width = 30;
  const float4 v = *reinterpret_cast<const float4*>(&gIn[first]);
  if (kBug || first + 4 <= width) {
    // BUG(race): global write of 16 bytes out of bounds
    // BUG(asan): use-after-poison
    *reinterpret_cast<float4*>(&gOut[first]) = v;
  } else {
    gOut[first] = v.x;
    gOut[first + 1] = v.y;
  }
}
PLANT(vector_over_the_end, 8, 0, 1, 30);

template <bool kBug>
__global__ void vector_not_aligned(const float* gIn, float* gOut) {
  const int first = 4 * threadIdx.x + known_at_run_time(gIn, kBug ? 2 : 0);
  // BUG(race): misaligned 16-byte global access
  const uint4 v = *reinterpret_cast<const uint4*>(&gIn[first]);
  gOut[threadIdx.x] = __uint_as_float(v.x);
}
PLANT(vector_not_aligned, 32);

template <bool kBug>
__global__ void two_blocks_write_one_word(const float* gIn, float* gOut) {
  const int row = kBug ? 63 * blockIdx.x : 64 * blockIdx.x;
  // BUG(race): two blocks of a launch write the same global memory
  gOut[row + threadIdx.x] = gIn[threadIdx.x];
}
PLANT(two_blocks_write_one_word, 64, 0, 2);

template <bool kBug>
__global__ void block_reads_its_neighbour(const float* gIn, float* gOut) {
  const int mine = 64 * blockIdx.x + threadIdx.x;
  gOut[mine] = gIn[mine];
  // BUG(race): a block reads global memory that another block of the launch writes
  const float other = gOut[kBug && blockIdx.x == 1 ? mine - 64 : mine];
  gOut[mine] = 2.0f * other;
}
PLANT(block_reads_its_neighbour, 64, 0, 2);

template <bool kBug>
__global__ void block_writes_what_another_reads(const float* gIn, float* gOut) {
  const int thread = threadIdx.x, block = blockIdx.x;
  if (block == 0) {
    gOut[thread] = gIn[thread];
    if (kBug) gOut[thread] += 0.0f * __uint_as_float(__float_as_uint(gOut[64 + thread]) & 1u);
  } else {
    // BUG(race): a block writes global memory that another block of the launch reads
    gOut[64 + thread] = gIn[thread];
  }
}
PLANT(block_writes_what_another_reads, 64, 0, 2);

template <bool kBug>
__global__ void shared_write_behind_the_end(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  float* slot = smem.value + (kBug ? thread + 1 : thread);
  // BUG(race): write of 4 bytes at smem\+0x100, past the block's 256
  // BUG(asan): use-after-poison
  *slot = gIn[thread];
  gOut[thread] = *slot;
}
PLANT(shared_write_behind_the_end, 64, kSlots);

template <bool kBug>
__global__ void shared_read_before_the_start(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  __syncthreads();
  const float* slot = smem.value + (kBug ? thread - 1 : 63 - thread);
  // BUG(race): read of 4 bytes at smem-0x4, before the block's
  // BUG(asan): use-after-poison
  gOut[thread] = *slot;
}
PLANT(shared_read_before_the_start, 64, kSlots);

template <bool kBug>
__global__ void shared_vector_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  smem.value[thread] = gIn[thread];
  __syncthreads();
  const int first = thread % 8 * 4 + known_at_run_time(gIn, kBug ? 2 : 0);
  // BUG(race): misaligned 16-byte shared access
  const uint4 v = *reinterpret_cast<const uint4*>(smem.value + first);
  gOut[thread] = __uint_as_float(v.y);
}
PLANT(shared_vector_not_aligned, 64, kSlots);

template <bool kBug>
__global__ void shared_memory_not_written(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Slots>();
  const int thread = threadIdx.x;
  if (!kBug || thread % 16 != 3) smem.value[thread] = gIn[thread];
  __syncthreads();
  gOut[thread] = smem.value[63 - thread];  // BUG(race): read of uninitialised shared memory
}
PLANT(shared_memory_not_written, 64, kSlots);

// g++ announces no store of an aggregate that a call returns: the harness must refuse it, not
// miss the races of what it wrote.
template <bool kBug>
__global__ void store_that_nobody_sees(const float* gIn, float* gOut) {
  struct Halves {
    __nv_bfloat16 value[64];
  };
  auto& smem = dynamic_smem<Halves>();
  const int thread = threadIdx.x;
  if constexpr (kBug) {
    smem.value[thread] = __float2bfloat16(gIn[thread]);
  } else {
    const __nv_bfloat16_raw raw = __float2bfloat16(gIn[thread]);
    reinterpret_cast<uint16_t*>(smem.value)[thread] = raw.x;
  }
  __syncthreads();  // BUG(race): changed .* by a store that the race detector can't see
  uint32_t wide = uint32_t{reinterpret_cast<uint16_t*>(smem.value)[63 - thread]} << 16;
  gOut[thread] = __uint_as_float(wide);
}
PLANT(store_that_nobody_sees, 64, 128);

// Atomics conflict with nothing, and what they change is no unseen store.
template <bool kBug>
__global__ void counter_without_atomics(const float* gIn, float* gOut) {
  struct Counter {
    int value;
  };
  auto& smem = dynamic_smem<Counter>();
  if (threadIdx.x == 0) smem.value = 5;
  __syncthreads();
  if constexpr (kBug) {
    smem.value += 2;  // BUG(race): race
  } else {
    atomicAdd(&smem.value, 2);
  }
  __syncthreads();
  gOut[threadIdx.x] = static_cast<float>(smem.value);
}
PLANT(counter_without_atomics, 64, 16);

template <bool kBug>
__global__ void storage_larger_than_the_launch_gave(const float* gIn, float* gOut) {
  struct Storage {
    float value[kBug ? 65 : 64];
  };
  // BUG(plain,race,asan): SharedStorage at .* has 260 bytes, the launch gave 256
  auto& smem = dynamic_smem<Storage>();
  smem.value[threadIdx.x] = gIn[threadIdx.x];
  gOut[threadIdx.x] = smem.value[threadIdx.x];
}
PLANT(storage_larger_than_the_launch_gave, 64, kSlots);

// Registers have no addresses: what runs off a local array is nobody's.
template <bool kBug>
__global__ void local_array_overrun(const float* gIn, float* gOut) {
  float fragment[8];
  const int end = known_at_run_time(gIn, kBug ? 9 : 8);
  for (int i = 0; i < end; ++i) {
    // BUG(asan): (stack-buffer-overflow|out of bounds for type)
    fragment[i] = gIn[threadIdx.x + i];
  }
  gOut[threadIdx.x] = fragment[threadIdx.x % 8];
}
PLANT(local_array_overrun, 32);

template <bool kBug>
__global__ void signed_overflow(const float* gIn, float* gOut) {
  const int rows = known_at_run_time(gIn, kBug ? 1 << 20 : 1 << 10);
  // BUG(asan): signed integer overflow
  const int elements = rows * (1 << 12);
  gOut[threadIdx.x] = static_cast<float>(elements >> 12);
}
PLANT(signed_overflow, 32);

template <bool kBug>
__global__ void shift_by_the_width(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  const int bits = known_at_run_time(gIn, kBug ? lane + 1 : lane);
  // BUG(asan): shift exponent 32 is too large
  gOut[lane] = static_cast<float>(1u << bits);
}
PLANT(shift_by_the_width, 32);

}  // namespace
}  // namespace planted
