// The reciprocal of the special function unit: one instruction.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.3, rcp.approx: 1 / x, within one unit of the last place; 0 of an infinity and of what is
// above 2^126.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fused_lm::ptx
