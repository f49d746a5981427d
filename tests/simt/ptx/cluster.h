// Host twin of csrc/ptx/cluster.h.
#pragma once

#include "ptx/launch.h"
#include "ptx/memory.h"

namespace fused_lm {

template <class... Parameters, class... Arguments>
Status launch_clusters(void (*kernel)(Parameters...), const LaunchConfig& config, unsigned blocks,
                       Arguments&&... args) {
  const std::tuple<std::remove_const_t<Parameters>...> given(std::forward<Arguments>(args)...);
  ::simt::run_grid(reinterpret_cast<const void*>(kernel), config.grid, config.block,
                   config.smem_bytes, static_cast<int>(blocks), [&] { std::apply(kernel, given); });
  return kOk;
}

}  // namespace fused_lm

namespace fused_lm::ptx {

inline int cluster_rank() { return ::simt::cluster_rank(); }
inline void cluster_arrive(SIMT_HERE) { ::simt::cluster_arrive(here); }
inline void cluster_wait(SIMT_HERE) { ::simt::cluster_wait(here); }
struct ClusterBarriers {
  uint64_t* first;
  int rank;
};
inline ClusterBarriers cluster_barriers(uint64_t* first, int rank) { return {first, rank}; }
inline void mbarrier_arrive_after_reads(ClusterBarriers barriers, int index, SIMT_HERE) {
  ::simt::mbarrier_arrive_at(barriers.first + index, barriers.rank, here);
}
template <class T>
T* cluster_shared(T* shared, int rank, SIMT_HERE) {
  return static_cast<T*>(::simt::cluster_shared(shared, rank, here));
}

}  // namespace fused_lm::ptx
