// Blocks of a cluster (sm_90): they run at the same time and reach each other's shared memory.
#pragma once

#include "ptx/launch.h"
#include "ptx/memory.h"

namespace fused_lm {

// launch() with clusters of so many blocks, neighbours along x. A function of its own: launch.h is
// part of what the records of kernels without clusters speak for.
template <class... Parameters, class... Arguments>
Status launch_clusters(void (*kernel)(Parameters...), const LaunchConfig& config, unsigned blocks,
                       Arguments&&... args) {
  const cudaError_t resized = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.smem_bytes));
  if (resized != cudaSuccess) return cudaGetErrorString(resized);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = config.stream;
  launch_config.attrs = &cluster;
  launch_config.numAttrs = 1;
  const cudaError_t error =
      cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(args)...);
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

}  // namespace fused_lm

namespace fused_lm::ptx {

// PTX 10, %cluster_ctarank.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// PTX 9.7.13, barrier.cluster.arrive: releases what this thread wrote. All threads of all blocks.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// PTX 9.7.13, barrier.cluster.wait: until all have arrived, and acquires what they released.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barriers of another block, by the first of them.
struct ClusterBarriers {
  uint32_t first;
};

// PTX 9.7.9, mapa.
__device__ __forceinline__ ClusterBarriers cluster_barriers(uint64_t* first, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(first)), "r"(rank));
  return {there};
}

// PTX 9.7.13, mbarrier.arrive.shared::cluster without a scope: one arrival, which says that this
// thread has read what the other block may now overwrite. It publishes no writes to that block, and
// costs no fence.
__device__ __forceinline__ void mbarrier_arrive_after_reads(ClusterBarriers barriers, int index) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barriers.first + 8 * index)
               : "memory");
}

// PTX 9.7.9, mapa: where another block of the cluster has what this one has at `shared`.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* shared, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(there);
}

}  // namespace fused_lm::ptx
