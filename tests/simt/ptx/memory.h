// Host twin of csrc/ptx/memory.h.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

inline uint32_t shared_address(const void* p) { return ::simt::shared_address(p); }

__forceinline__ uint4 load_streaming(const uint4* p) { return *p; }
__forceinline__ uint2 load_streaming(const uint2* p) { return *p; }

__forceinline__ void store_pinned(float* shared, float value) { *shared = value; }

}  // namespace fused_lm::ptx
