// The special function unit (MUFU): one instruction each, with the errors that PTX states.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.3.20 ex2.approx: 2^x, relative error below 2^-22.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX 9.7.3.19 lg2.approx: log2(x), absolute error below 2^-22 for x in (0.5, 2), relative
// elsewhere.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX 9.7.3.13 rcp.approx: 1 / x, relative error below 2^-23.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX 9.7.3.22 tanh.approx (sm_75): relative error below 2^-11, enough for bf16 results only.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fused_lm::ptx
