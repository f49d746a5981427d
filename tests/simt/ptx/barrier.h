// Host twin of csrc/ptx/barrier.h.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

inline void named_barrier_sync(int barrier, int threads, SIMT_HERE) {
  ::simt::barrier_sync(barrier, threads, here);
}

inline void named_barrier_arrive(int barrier, int threads, SIMT_HERE) {
  ::simt::barrier_arrive(barrier, threads, here);
}

}  // namespace fused_lm::ptx
