// Named barriers of a block. Barrier 0 is __syncthreads.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.13, bar.sync: waits until `threads` threads (a multiple of 32) have arrived.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// PTX 9.7.13, bar.arrive: counts without waiting.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace fused_lm::ptx
