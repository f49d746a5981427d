// Asynchronous copies of bytes that lie one behind the other (sm_90), without a tensor map, and
// adds to global memory. Addresses and sizes are multiples of 16 bytes.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

// PTX 9.7.9.25, cp.async.bulk: to shared memory; the barrier, which expects them, counts the bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// PTX 9.7.9.25, cp.reduce.async.bulk: floats of shared memory, which fence_proxy_async has made
// visible to it, are added to those of global memory. Waited for like tma_store, see ptx/tma.h.
__device__ __forceinline__ void bulk_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared_address(shared)), "r"(bytes)
      : "memory");
}

// PTX 9.7.13, red.global.add.v4 (sm_90): adds four floats from registers, each on its own.
__device__ __forceinline__ void add_quad(float* global, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

}  // namespace fused_lm::ptx
