// Mistakes between the blocks of a cluster of two.
#include "planted/box.h"
#include "ptx/cluster.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 64, kBlocks = 2;

struct Shared {
  alignas(1024) float tile[kBox];
  uint64_t full, empty;
};
constexpr size_t kShared = sizeof(Shared);

__device__ __forceinline__ void meet() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

template <bool kBug>
__global__ void peer_read_before_it_writes(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  smem.tile[thread] = gIn[64 * rank + thread];
  kBug ? __syncthreads() : meet();
  const float* theirs = ptx::cluster_shared(smem.tile, 1 - rank);
  gOut[64 * rank + thread] = theirs[thread];  // BUG(race): (not ordered|uninitialised)
  meet();                                     // a block that ends takes its shared memory with it
}
PLANT(peer_read_before_it_writes, kThreads, kShared, kBlocks, 0, kBlocks);

template <bool kBug>
__global__ void peer_that_has_ended(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  smem.tile[thread] = gIn[64 * rank + thread];
  meet();
  const float* theirs =
      ptx::cluster_shared(smem.tile, 1 - rank);  // BUG(plain,race,asan): has ended
  gOut[64 * rank + thread] = theirs[63 - thread];
  if constexpr (!kBug) meet();  // a block that ends takes its shared memory with it
}
PLANT(peer_that_has_ended, kThreads, kShared, kBlocks, 0, kBlocks);

template <bool kBug>
__global__ void rank_outside_the_cluster(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  smem.tile[thread] = gIn[64 * rank + thread];
  meet();
  // BUG(plain,race,asan): block 2 of a cluster of 2
  const float* theirs = ptx::cluster_shared(smem.tile, kBug ? 2 : 1 - rank);
  gOut[64 * rank + thread] = theirs[thread];
  meet();  // a block that ends takes its shared memory with it
}
PLANT(rank_outside_the_cluster, kThreads, kShared, kBlocks, 0, kBlocks);

template <bool kBug>
__global__ void cluster_wait_without_arrival(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  smem.tile[thread] = gIn[64 * rank + thread];
  if (!kBug || thread != 5) ptx::cluster_arrive();
  ptx::cluster_wait();  // BUG(plain,race,asan): (the thread has not arrived|deadlock)
  gOut[64 * rank + thread] = ptx::cluster_shared(smem.tile, 1 - rank)[thread];
  meet();  // a block that ends takes its shared memory with it
}
PLANT(cluster_wait_without_arrival, kThreads, kShared, kBlocks, 0, kBlocks);

__device__ __forceinline__ void init_full(Shared& smem) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
}

// Block 0 loads for both; each expects its own bytes.
template <bool kBug>
__global__ void multicast_not_expected(const __grid_constant__ Maps maps, const float* gIn,
                                       float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  init_full(smem);
  meet();
  if (thread == 0) {
    if (kBug && rank == 1) {
      ptx::mbarrier_arrive(&smem.full);  // BUG(plain,race,asan): too few bytes were expected
    } else {
      ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    }
    if (rank == 0) ptx::tma_load_multicast(smem.tile, maps.in, &smem.full, {0, 0}, 3);
  }
  ptx::mbarrier_wait(&smem.full, 0);
  gOut[64 * rank + thread] = smem.tile[thread];
  meet();  // a block that ends takes its shared memory with it
}
PLANT(multicast_not_expected, kThreads, kShared, kBlocks, 0, kBlocks);

// Before block 0 loads again, both must have read: each tells it.
template <bool kBug>
__global__ void multicast_over_what_the_peer_reads(const __grid_constant__ Maps maps,
                                                   const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  init_full(smem);
  if (thread == 0) ptx::mbarrier_init(&smem.empty, (kBug ? 1 : kBlocks) * kThreads);
  meet();
  float sum = 0.0f;
  for (int i = 0; i < 2; ++i) {
    if (thread == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
      if (rank == 0) {
        if (i > 0) ptx::mbarrier_wait(&smem.empty, 0);
        // BUG(race): (write to data whose read is not ordered before it|two writes)
        ptx::tma_load_multicast(smem.tile, maps.in, &smem.full, {0, 8 * i}, 3);
      }
    }
    ptx::mbarrier_wait(&smem.full, i);
    sum += smem.tile[thread];
    if (i == 0 && (!kBug || rank == 0)) ptx::mbarrier_arrive_at(&smem.empty, 0);
  }
  gOut[64 * rank + thread] = sum;
  meet();  // a block that ends takes its shared memory with it
}
PLANT(multicast_over_what_the_peer_reads, kThreads, kShared, kBlocks, 0, kBlocks);

template <bool kBug>
__global__ void arrival_at_the_wrong_block(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Shared>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  if (thread == 0) ptx::mbarrier_init(&smem.empty, kThreads);
  meet();
  float* theirs = ptx::cluster_shared(smem.tile, 1 - rank);
  theirs[thread] = gIn[64 * rank + thread];
  ptx::mbarrier_arrive_at(&smem.empty, kBug ? rank : 1 - rank);
  ptx::mbarrier_wait(&smem.empty, 0);
  gOut[64 * rank + thread] = smem.tile[63 - thread];  // BUG(race): (not ordered|uninitialised)
  meet();  // a block that ends takes its shared memory with it
}
PLANT(arrival_at_the_wrong_block, kThreads, kShared, kBlocks, 0, kBlocks);

}  // namespace
}  // namespace planted
