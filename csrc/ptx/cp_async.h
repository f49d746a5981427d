// Asynchronous copies from global to shared memory (sm_80).
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

// PTX 9.7.9, cp.async.cg: 16 bytes, past the L1. Bytes from source_bytes (0..16) on are
// zeros, and are not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global,
                                            int source_bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(source_bytes)
      : "memory");
}

// PTX 9.7.9, cp.async.ca: 4 or 8 bytes, for rows that are not 16-byte aligned.
template <int kBytes>
__device__ __forceinline__ void cp_async_small(void* shared, const void* global,
                                               int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
               "l"(global), "n"(kBytes), "r"(source_bytes)
               : "memory");
}

// PTX 9.7.9, cp.async.commit_group: closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// PTX 9.7.9, cp.async.wait_group: at most kPending of this thread's groups stay in flight. Other
// threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fused_lm::ptx
