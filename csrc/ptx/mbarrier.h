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

// PTX 9.7.13, mbarrier.expect_tx: the current phase waits for that many bytes more.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// PTX 9.7.13, mbarrier.arrive.expect_tx: the same, and one arrival.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// PTX 9.7.13, mbarrier.arrive.shared::cluster: one arrival at this barrier of another block of the
// cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// PTX 9.7.13, fence.mbarrier_init: makes this thread's mbarrier_init visible to TMA and to the
// cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// sm_90 lets the thread sleep in between.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FUSED_LM_WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define FUSED_LM_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif

// PTX 9.7.13, mbarrier.try_wait or test_wait: returns when the phase of this parity has ended, and
// acquires what it released.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n" FUSED_LM_WAIT
      " done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#undef FUSED_LM_WAIT

}  // namespace fused_lm::ptx
