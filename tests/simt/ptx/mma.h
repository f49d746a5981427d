// Host twin of csrc/ptx/mma.h.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16, SIMT_HERE) {
  ::simt::mma_m16n8k16(d, a, b, ::simt::Half::kBFloat16, here);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         SIMT_HERE) {
  ::simt::mma_m16n8k16(d, a, b, ::simt::Half::kFloat16, here);
}

}  // namespace fused_lm::ptx
