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

// PTX 9.7.13, bar.red.or: the same, and whether the predicate of any of them holds. A vote, like
// those of a warp: nothing here relies on what it does to the order of memory.
__device__ __forceinline__ bool named_barrier_any(int barrier, int threads, bool predicate) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred mine, any;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(static_cast<uint32_t>(predicate))
      : "memory");
  return any != 0;
}

}  // namespace fused_lm::ptx
