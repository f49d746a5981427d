// Host twin of csrc/ptx/lane.h.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

inline int lane_index() { return ::simt::current_thread->lane; }

inline unsigned thread_index() { return threadIdx.x; }

}  // namespace fused_lm::ptx
