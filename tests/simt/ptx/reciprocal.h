// Host twin of csrc/ptx/reciprocal.h: the rounded quotient, flushing as .ftz does.
#pragma once

#include "ptx/math.h"

namespace fused_lm::ptx {

inline float reciprocal_approx(float x) { return ::simt::flushed(1.0f / ::simt::flushed(x)); }

}  // namespace fused_lm::ptx
