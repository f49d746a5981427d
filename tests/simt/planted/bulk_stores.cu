// Mistakes with bulk stores by tensor maps.
#include "planted/box.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64;

// gOut is one box; four floats a thread.
__device__ __forceinline__ void fill(Tiles& smem, const float* gIn, float factor) {
  for (int i = threadIdx.x; i < kBox; i += kThreads) smem.tile[0][at(i)] = factor * gIn[i];
}

template <bool kBug>
__global__ void store_of_unfenced_writes(const __grid_constant__ Maps maps, const float* gIn,
                                         float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  fill(smem, gIn, 2.0f);
  if constexpr (!kBug) ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(maps.out, smem.tile[0], {0, 0});  // BUG(race): written without a proxy fence
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}
PLANT(store_of_unfenced_writes, kThreads, kTiles, 1, kBox);

template <bool kBug>
__global__ void store_before_all_have_written(const __grid_constant__ Maps maps, const float* gIn,
                                              float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  fill(smem, gIn, 2.0f);
  ptx::fence_proxy_async();
  if constexpr (!kBug) __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(maps.out, smem.tile[0], {0, 0});  // BUG(race): (not ordered|uninitialised)
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}
PLANT(store_before_all_have_written, kThreads, kTiles, 1, kBox);

template <bool kBug>
__global__ void stored_tile_reused_too_soon(const __grid_constant__ Maps maps, const float* gIn,
                                            float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  for (int i = 0; i < 2; ++i) {
    for (int j = threadIdx.x; j < kBox; j += kThreads) {
      smem.tile[0][at(j)] = gIn[j] + i;  // BUG(race): write to data whose read is not ordered
    }
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store(maps.out, smem.tile[0], {0, 8 * i});
      ptx::bulk_commit();
      if (!kBug || i == 1) ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
}
PLANT(stored_tile_reused_too_soon, kThreads, kTiles, 1, 2 * kBox);

template <bool kBug>
__global__ void store_never_committed(const __grid_constant__ Maps maps, const float* gIn,
                                      float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  fill(smem, gIn, 3.0f);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(maps.out, smem.tile[0], {0, 0});  // BUG(plain,race,asan): was never committed
    if constexpr (!kBug) ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}
PLANT(store_never_committed, kThreads, kTiles, 1, kBox);

template <bool kBug>
__global__ void store_not_waited_for(const __grid_constant__ Maps maps, const float* gIn,
                                     float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  fill(smem, gIn, 3.0f);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(maps.out, smem.tile[0], {0, 0});  // BUG(plain,race,asan): nobody waited for
    ptx::bulk_commit();
    if constexpr (!kBug) ptx::bulk_wait_read<0>();
  }
}
PLANT(store_not_waited_for, kThreads, kTiles, 1, kBox);

// wait_group.read says that the tile has been read, not that the tensor has been written.
template <bool kBug>
__global__ void result_read_after_wait_read(const __grid_constant__ Maps maps, const float* gIn,
                                            float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  fill(smem, gIn, 3.0f);
  for (int i = 1 + threadIdx.x; i < kBox; i += kThreads) gOut[kBox + i] = gIn[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(maps.out, smem.tile[0], {0, 0});
    ptx::bulk_commit();
    kBug ? ptx::bulk_wait_read<0>() : ptx::bulk_wait<0>();
    const float first = gOut[0];  // BUG(race): global memory, read by thread 0
    gOut[kBox] = first + 1.0f;
  }
}
PLANT(result_read_after_wait_read, kThreads, kTiles, 1, 2 * kBox);

// Both add one box; a store instead loses the first.
template <bool kStores>
__global__ void fragments_reduce_add(const __grid_constant__ Maps maps, const float* gIn,
                                     float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  for (int i = threadIdx.x; i < kBox; i += kThreads) gOut[i] = 100.0f;
  fill(smem, gIn, 2.0f);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      if constexpr (kStores) {
        ptx::tma_store(maps.out, smem.tile[0], {0, 0});
      } else {
        ptx::tma_reduce_add(maps.out, smem.tile[0], {0, 0});
      }
      ptx::bulk_commit();
      ptx::bulk_wait<0>();
    }
  }
}
PLANT(fragments_reduce_add, kThreads, kTiles, 1, kBox);

}  // namespace
}  // namespace planted
