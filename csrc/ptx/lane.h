// The numbers of lane and thread, read anew: what depends on threadIdx is computed before a loop
// and kept; what depends on these is computed where it is used.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 10, %laneid.
__device__ __forceinline__ int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// PTX 10, %tid.x: threadIdx.x.
__device__ __forceinline__ unsigned thread_index() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace fused_lm::ptx
