// Host twin of csrc/ptx/cluster.h.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

inline int cluster_rank() { return ::simt::cluster_rank(); }
inline void cluster_arrive(SIMT_HERE) { ::simt::cluster_arrive(here); }
inline void cluster_wait(SIMT_HERE) { ::simt::cluster_wait(here); }
template <class T>
T* cluster_shared(T* shared, int rank, SIMT_HERE) {
  return static_cast<T*>(::simt::cluster_shared(shared, rank, here));
}

}  // namespace fused_lm::ptx
