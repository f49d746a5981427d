// The special function unit (MUFU): one instruction each, with the errors that PTX states.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.3, ex2.approx: 2^x, relative error below 2^-22; denormals are zeros.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fused_lm::ptx
