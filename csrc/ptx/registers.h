// Registers that the warps of a warpgroup may use beyond, or give back below, those of the launch
// (sm_90a). All four warps execute it; those who give back come first, or the others wait for ever.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.19.5, setmaxnreg.dec.
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// PTX 9.7.19.5, setmaxnreg.inc: waits until the registers are there.
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace fused_lm::ptx
