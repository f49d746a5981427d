// Host twin of csrc/ptx/builtins.h: CUDA's built-in names for g++, on top of the harness.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "harness/simt.h"

#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __constant__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
// Shared memory is dynamic_smem<SharedStorage>() (ptx/launch.h): only that is watched.
#define __shared__ static_assert(false, "static __shared__ memory is not supported")

#define threadIdx (::simt::current_thread->index)
#define blockIdx (::simt::current_block->index)
#define blockDim (::simt::current_block->size)
#define gridDim (::simt::current_block->grid)
inline constexpr int warpSize = 32;

// The place of the call, as the last argument of everything that reports.
#define SIMT_HERE ::simt::Location here = ::simt::Location::here()

// Barriers and votes.
inline void __syncthreads(SIMT_HERE) { ::simt::barrier_sync(0, ::simt::kAllThreads, here); }
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return ::simt::barrier_reduce(predicate, here);
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return ::simt::barrier_reduce(predicate, here) > 0;
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return ::simt::barrier_reduce(!predicate, here) == 0;
}
inline void __syncwarp(uint32_t mask = ~0u, SIMT_HERE) { ::simt::sync_warp(mask, here); }
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_HERE) {
  return ::simt::vote(mask, predicate != 0, here);
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_HERE) {
  return ::simt::vote(mask, predicate != 0, here) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_HERE) {
  return ::simt::vote(mask, predicate == 0, here) == 0;
}

// Shuffles within segments of `width` lanes.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_HERE) {
  const int lane = ::simt::current_thread->lane;
  return ::simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), here);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32, SIMT_HERE) {
  const int lane = ::simt::current_thread->lane, source = lane ^ flip;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return ::simt::shuffle(mask, value, inside ? source : lane, here);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int lane = ::simt::current_thread->lane, step = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) + step < width;
  return ::simt::shuffle(mask, value, inside ? lane + step : lane, here);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int lane = ::simt::current_thread->lane, step = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) >= step;
  return ::simt::shuffle(mask, value, inside ? lane - step : lane, here);
}

// Memory order between blocks is not modelled; within a block, barriers make it.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// Atomics: one OS thread runs everything, so each is one step. They conflict with nothing.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  ::simt::note_atomic(p, sizeof(T), here);
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicMax(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  ::simt::note_atomic(p, sizeof(T), here);
  const T old = *p;
  *p = std::max(old, value);
  return old;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicExch(T* p, std::type_identity_t<T> value,
                                                    SIMT_HERE) {
  ::simt::note_atomic(p, sizeof(T), here);
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, std::type_identity_t<T> expected,
                                                   std::type_identity_t<T> value, SIMT_HERE) {
  ::simt::note_atomic(p, sizeof(T), here);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// Arithmetic.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __ffs(uint32_t x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
using std::max;
using std::min;
