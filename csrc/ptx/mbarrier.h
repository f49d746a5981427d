// Barriers in shared memory that count arrivals and, on sm_90, bytes; a phase ends when all have
// come. Wait for a phase by its parity, 0 first.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

// PTX 9.7.13, mbarrier.init: one thread, before a fence or __syncthreads that the others pass.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// PTX 9.7.13, mbarrier.inval: the memory may be used for something else afterwards.
__device__ __forceinline__ void mbarrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// PTX 9.7.13, mbarrier.arrive: one arrival, which releases what this thread wrote.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
      : "memory");
}

// PTX 9.7.13, cp.async.mbarrier.arrive.noinc: arrives when this thread's cp.asyncs so far are done.
__device__ __forceinline__ void mbarrier_arrive_cp_async(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// PTX 9.7.13, mbarrier.test_wait: returns when the phase of this parity has ended, and acquires
// what it released.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace fused_lm::ptx
