// A consumer of Hopper's matrix product, a warpgroup: its products, and how its results leave. The
// story is in gemm_sm90.h.
#pragma once

#include "kernels/gemm_tiles_sm90.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/lane.h"
#include "ptx/matrix.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"

namespace fused_lm {
namespace gemm {

// The descriptor of an operand that lies `bytes` further on. What changes is in its low word: a
// carry into the high one would cost an instruction for each product.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return descriptor >> 32 << 32 | low;
}

template <class C>
struct Consumer {
  typename C::SharedStorage& smem;
  const Arguments& args;
  int group;
  Ring<C::kStages> ring;
  uint32_t source_parity = 0;
  ptx::ClusterBarriers neighbours;  // its `empty`, in a cluster

  __device__ __forceinline__ Consumer(typename C::SharedStorage& storage, const Arguments& told,
                                      int own)
      : smem(storage), args(told), group(own) {
    if constexpr (C::kCluster == 2) {
      neighbours = ptx::cluster_barriers(smem.barriers.empty, ptx::cluster_rank() ^ 1);
    }
  }

  // Its rows of a tile begin there.
  __device__ __forceinline__ int first_row() const {
    return C::kPingPong ? 0 : group * kProductRows;
  }

  // Read anew where it is needed: kept, it costs a register in the main loop.
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(ptx::thread_index()) % kGroupThreads;
  }

  // 64 rows of a tile further on: of K-major rows, or a slab of a turned operand.
  static constexpr uint32_t kNextRows = kProductRows * 2 * kGemmBlockK;

  __device__ __forceinline__ uint64_t left() const {
    const auto& a = smem.stages[0].a;
    return advanced(C::kTurnedA ? a.mn_major() : a.k_major(0), first_row() * 2 * kGemmBlockK);
  }
  __device__ __forceinline__ uint64_t right() const {
    const auto& b = smem.stages[0].b;
    return C::kTurnedB ? b.mn_major() : b.k_major(0);
  }

  // Every warp says for itself, behind a wgmma_wait of all its lanes, that it no longer reads a
  // stage: to all who write there.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % kWarpSize != 0) return;
    ptx::mbarrier_arrive(&smem.barriers.empty[stage]);
    if constexpr (C::kCluster == 2) ptx::mbarrier_arrive_after_reads(neighbours, stage);
  }

  // Waits for a stage and issues its products, a batch: sums = a b^T, or += where they go on.
  template <bool kGoesOn>
  __device__ __forceinline__ void issue(Sums<C>& sums, uint64_t a, uint64_t b) {
    constexpr ptx::Major kMajorA = C::kTurnedA ? ptx::Major::kMn : ptx::Major::kK;
    constexpr ptx::Major kMajorB = C::kTurnedB ? ptx::Major::kMn : ptx::Major::kK;
    ptx::mbarrier_wait(&smem.barriers.full[ring.stage], ring.parity);
    const uint32_t stage_off = ring.stage * static_cast<uint32_t>(sizeof(typename C::Stage));
    a = moved(a, stage_off);
    b = moved(b, stage_off);
#pragma unroll
    for (int m = 0; m < C::kM; ++m) ptx::registers_fence(sums[m]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      const uint32_t a_off = C::kTurnedA ? C::A::mn_step(step) : C::A::k_step(step);
      const uint32_t b_off = C::kTurnedB ? C::B::mn_step(step) : C::B::k_step(step);
#pragma unroll
      for (int m = 0; m < C::kM; ++m) {
        ptx::wgmma_ss<typename C::Element, C::kBlockN, kMajorA, kMajorB>(
            sums[m], moved(a, m * kNextRows + a_off), moved(b, b_off), kGoesOn || step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // sums = a b^T over so many steps of K. A batch stays under way while the stage of the one before
  // it goes back; `issued` is called when the last one is. The first stands apart: it defines the
  // sums, and what they were is not kept through the epilogue before.
  template <class Issued>
  __device__ __forceinline__ void multiply(Sums<C>& sums, uint64_t a, uint64_t b, int steps,
                                           const Issued& issued) {
    issue<false>(sums, a, b);
#pragma unroll 2
    for (int step = 1; step < steps; ++step) {
      const int before = ring.stage;
      ring.next();
      issue<true>(sums, a, b);
      ptx::wgmma_wait<1>();
      release(before);
    }
    issued();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < C::kM; ++m) ptx::registers_fence(sums[m]);
    release(ring.stage);
    ring.next();
  }

  // Stores 64 columns of results of its rows by TMA, which leaves out what is outside. They go
  // through slab `place`, another one than the last: the thread that issues has waited until the
  // last one was read, so after the next barrier the group may write there again. So a slab costs
  // one barrier. Counted at run time, `place` would be spilled.
  __device__ __forceinline__ void send(const ptx::TensorMap& map, const Packed<C>& values,
                                       int place, int row, int column) {
    auto& sSlab = smem.slabs[group][place];
    const int own = thread(), lane = own % kWarpSize;
    const int own_row = own / kWarpSize * 16 + lane % 16;
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
      uint4* sRow = sSlab.at(own_row, 2 * block + lane / 16);
#pragma unroll
      for (int m = 0; m < C::kM; ++m) {
        ptx::stmatrix_x4(sRow + m * kProductRows * C::Slab::kSlabChunks, values[m][block]);
      }
    }
    ptx::fence_proxy_async();
    if (own == 0) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(kSlabWritten + group, kGroupThreads);
    if (own == 0) {
      ptx::tma_store(map, &sSlab.chunks[0][0][0], {column, row});
      ptx::bulk_commit();
    }
  }

  // After an odd number of slabs: the next tile begins in the place where this one ended. That all
  // of the group know it, its turn to multiply sees to.
  __device__ __forceinline__ void wait_for_slabs() {
    static_assert(C::kPingPong, "without turns it takes a barrier");
    if (thread() == 0) ptx::bulk_wait_read<0>();
  }
};

}  // namespace gemm
}  // namespace fused_lm
