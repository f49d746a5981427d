// Shared memory addresses and global accesses with a cache policy.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// The address of a shared variable in the .shared window, as cp.async and ldmatrix want
// it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// PTX 9.7.9, ld.global.nc.L1::no_allocate: 16 bytes that this kernel reads once and nobody writes.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// The same for 8 bytes.
__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}

// PTX 9.7.9, st.volatile.shared: a store that stays where it is written. ptxas moves a
// wgmma_wait above arithmetic, but not above this: what `value` depends on is computed first.
__device__ __forceinline__ void store_pinned(float* shared, float value) {
  asm volatile("st.volatile.shared.f32 [%0], %1;" ::"r"(shared_address(shared)), "f"(value)
               : "memory");
}

}  // namespace fused_lm::ptx
