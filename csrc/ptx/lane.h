// The lane's number, read anew.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 10, %laneid. What depends on threadIdx is computed before a loop and kept; what depends on
// this is computed where it is used.
__device__ __forceinline__ int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

}  // namespace fused_lm::ptx
