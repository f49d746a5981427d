// Mistakes with bulk loads by tensor maps, of the first box of gIn where nothing else is said.
#include "planted/box.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64;

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
