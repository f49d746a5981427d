// Host twin of csrc/ptx/math.h: the exact function, flushing as .ftz does.
#pragma once

#include "ptx/builtins.h"

namespace simt {
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
}  // namespace simt

namespace fused_lm::ptx {

inline float exp2_approx(float x) { return ::simt::flushed(exp2f(::simt::flushed(x))); }

}  // namespace fused_lm::ptx
