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

inline bool named_barrier_any(int barrier, int threads, bool predicate, SIMT_HERE) {
  return ::simt::barrier_vote(barrier, threads, predicate, here) > 0;
}

}  // namespace fused_lm::ptx
