// Mistakes with bulk copies by tensor maps. Only the first box of gIn is loaded where nothing else
// is said: 8 rows of 32 floats, swizzled.
#include "planted/case.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64;
constexpr int kBox = kBoxRows * kMapColumns;
constexpr uint32_t kBoxBytes = kBox * sizeof(float);

struct Tiles {
  alignas(1024) float tile[2][kBox];
  uint64_t full, empty;
};
constexpr size_t kTiles = sizeof(Tiles);

// Where swizzling puts float i of a box.
__device__ __forceinline__ int at(int i) {
  const int row = i / kMapColumns, chunk = i % kMapColumns / 4;
  return row * kMapColumns + (chunk ^ row) * 4 + i % 4;
}

template <bool kFenced = true>
__device__ __forceinline__ void init(Tiles& smem) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    if constexpr (kFenced) ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

template <bool kBug>
__global__ void bulk_load_not_waited_for(const __grid_constant__ Maps maps, const float* gIn,
                                         float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
  }
  if constexpr (!kBug) ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];  // BUG(race): (not ordered|uninitialised)
  if constexpr (kBug) ptx::mbarrier_wait(&smem.full, 0);
}
PLANT(bulk_load_not_waited_for, kThreads, kTiles);

template <bool kBug>
__global__ void too_few_bytes_expected(const __grid_constant__ Maps maps, const float* gIn,
                                       float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBug ? kBoxBytes / 2 : kBoxBytes);
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
  }
  // BUG(plain,race,asan): deadlock .*mbarrier wait at .* and -512 bytes
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(too_few_bytes_expected, kThreads, kTiles);

// What two loads bring is expected of one: the phase ends while the other is under way.
template <bool kBug>
__global__ void second_load_not_expected(const __grid_constant__ Maps maps, const float* gIn,
                                         float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBug ? kBoxBytes : 2 * kBoxBytes);
    // BUG(plain,race,asan): ended at .* while 1 bulk loads into it were under way
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
    ptx::tma_load(smem.tile[1], maps.in, &smem.full, {0, 8});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)] + smem.tile[1][at(threadIdx.x)];
}
PLANT(second_load_not_expected, kThreads, kTiles);

template <bool kBug>
__global__ void load_before_the_init_is_fenced(const __grid_constant__ Maps maps, const float* gIn,
                                               float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init<!kBug>(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    // BUG(plain,race,asan): was not fenced before the async proxy
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(load_before_the_init_is_fenced, kThreads, kTiles);

template <bool kBug>
__global__ void loaded_over_while_read(const __grid_constant__ Maps maps, const float* gIn,
                                       float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  const int thread = threadIdx.x;
  if (thread == 0) ptx::mbarrier_init(&smem.empty, kThreads);
  init(smem);
  float sum = 0.0f;
  for (int i = 0; i < 2; ++i) {
    if (thread == 0) {
      if (!kBug && i > 0) ptx::mbarrier_wait(&smem.empty, 0);
      ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
      // BUG(race): write to data whose read is not ordered before it
      ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 8 * i});
    }
    ptx::mbarrier_wait(&smem.full, i);
    sum += smem.tile[0][at(thread)];
    if (i == 0) ptx::mbarrier_arrive(&smem.empty);
  }
  gOut[thread] = sum;
}
PLANT(loaded_over_while_read, kThreads, kTiles);

// Ordinary stores, then a load over them: they may land afterwards.
template <bool kBug>
__global__ void load_over_unfenced_stores(const __grid_constant__ Maps maps, const float* gIn,
                                          float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  smem.tile[0][threadIdx.x] = 0.0f;
  if constexpr (!kBug) ptx::fence_proxy_async();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    // BUG(race): written without a proxy fence
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(load_over_unfenced_stores, kThreads, kTiles);

template <bool kBug>
__global__ void box_not_at_its_alignment(const __grid_constant__ Maps maps, const float* gIn,
                                         float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    // BUG(plain,race,asan): is no multiple of 1024
    ptx::tma_load(smem.tile[0] + (kBug ? 32 : 0), maps.in, &smem.full, {0, 0});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(box_not_at_its_alignment, kThreads, kTiles);

template <bool kBug>
__global__ void box_past_shared_memory(const __grid_constant__ Maps maps, const float* gIn,
                                       float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    // BUG(plain,race,asan): are outside of the block's
    ptx::tma_load(smem.tile[0] + (kBug ? 3 * kBox : 0), maps.in, &smem.full, {0, 0});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(box_past_shared_memory, kThreads, kTiles);

template <bool kBug>
__global__ void too_many_coordinates(const __grid_constant__ Maps maps, const float* gIn,
                                     float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    if constexpr (kBug) {
      // BUG(plain,race,asan): 3 coordinates for a tensor map of 2
      ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0, 0});
    } else {
      ptx::tma_load(smem.tile[0], maps.in, &smem.full, {0, 0});
    }
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[threadIdx.x] = smem.tile[0][at(threadIdx.x)];
}
PLANT(too_many_coordinates, kThreads, kTiles);

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

// A box that is half outside: zeros are loaded and nothing is stored there.
template <bool kBefore>
__global__ void fragments_box_outside(const __grid_constant__ Maps maps, const float* gIn,
                                      float* gOut) {
  auto& smem = dynamic_smem<Tiles>();
  init(smem);
  const int row = kBefore ? -4 : kInputs / kMapColumns - 4, column = kBefore ? -8 : 8;
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    ptx::tma_load(smem.tile[0], maps.in, &smem.full, {column, row});
  }
  ptx::mbarrier_wait(&smem.full, 0);
  for (int i = threadIdx.x; i < kBox; i += kThreads) gOut[i] = smem.tile[0][at(i)];
}
PLANT(fragments_box_outside, kThreads, kTiles, 1, kBox);

}  // namespace
}  // namespace planted
