// The epilogue that goes back through an activation: dpre = a b^T act'(pre), and sums of dpre over
// the rows of a tile, which are parts of dbias.
//
// TMA has brought the tile of pre into the slabs by which dpre leaves. A warp reads a block of 16 x
// 16 from there and stores its results to the same place: a lane names the same row both times, so
// no barrier is needed in between.
//
// Sums: of every 16 columns a lane has four, and its rows. Lanes that have the same columns
// exchange halves of them until each has the sum of one, in 4 shuffles; the four warps meet in
// shared memory. A tile's sums are a row of `partial`, which column_sums adds up: nobody adds at
// the same time, and results repeat. They are sums of dpre before it is rounded.
#pragma once

#include "kernels/activation.h"
#include "kernels/gemm_epilogue_sm90.h"

namespace fused_lm {
namespace gemm {

// Lanes that differ in bit kLanes exchange halves of 2 kKept values: each keeps kKept sums.
template <int kKept, int kLanes>
__device__ __forceinline__ void halve(float (&value)[4], int lane) {
  const bool upper = (lane & kLanes) != 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const float mine = upper ? value[i + kKept] : value[i];
    const float given = upper ? value[i] : value[i + kKept];
    value[i] = mine + __shfl_xor_sync(kAllLanes, given, kLanes);
  }
}

// A lane's sums of four columns, added to those of others: a warp's sums of 16 columns to sSums.
__device__ __forceinline__ void store_block_sums(float* sSums, float (&column)[4], int lane) {
  halve<2, 16>(column, lane);
  halve<1, 8>(column, lane);
  column[0] += __shfl_xor_sync(kAllLanes, column[0], 4);
  if (lane % 8 < 4) {
    sSums[lane / 16 * kFragmentColumns + lane % 4 * 2 + lane / 8 % 2] = column[0];
  }
}

__device__ __forceinline__ float sum_of_warps(
    const float (&sSums)[kGroupThreads / kWarpSize][kSlabColumns], int column) {
  return (sSums[0][column] + sSums[1][column]) + (sSums[2][column] + sSums[3][column]);
}

// dpre of 16 columns of a consumer's rows; their sums to sSums.
template <class C, class Formula>
__device__ __forceinline__ void block_back(Sums<C>& sums, const Formula& formula, uint4* sBlock,
                                           float* sSums, int fragment, int lane) {
  constexpr DType kDType = kDTypeOf<typename C::Element>;
  float column[4] = {};
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
    uint4* sRow = sBlock + m * kProductRows * C::Slab::kSlabChunks;
    uint32_t words[4];
    ptx::ldmatrix_x4(words, sRow);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float pre[2];
      widen_pair<kDType>(pre, words[i]);
      const float* own = &sums[m][fragment + i / 2][i % 2 * 2];
      const float first = own[0] * formula.slope(pre[0]);
      const float second = own[1] * formula.slope(pre[1]);
      column[i / 2 * 2] += first;
      column[i / 2 * 2 + 1] += second;
      words[i] = narrow_pair<kDType>(first, second);
    }
    ptx::stmatrix_x4(sRow, words);
  }
  store_block_sums(sSums, column, lane);
}

struct ActivationBackwardEpilogue {
  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const Arguments& args = own.args;
    auto& barriers = own.smem.barriers;
    ptx::mbarrier_wait(&barriers.source_full[own.group][0], own.source_parity);
    own.source_parity ^= 1u;
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      const int first = column + slab * kSlabColumns;
      with_activation(args.layer.activation,
                      [&](const auto& formula) { slab_back<C>(own, sums, formula, slab); });
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kSlabWritten + own.group, kGroupThreads);
      if (Consumer<C>::thread() == 0) {
        ptx::tma_store(args.out, &own.smem.slabs[own.group][slab].chunks[0][0][0], {first, row});
        ptx::bulk_commit();
      }
      if (args.layer.partial != nullptr) store_sums<C>(own, slab, row, first);
    }
    if (Consumer<C>::thread() == 0) {
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(&barriers.source_empty[own.group]);
    }
  }

  template <class C, class Formula>
  static __device__ __forceinline__ void slab_back(Consumer<C>& own, Sums<C>& sums,
                                                   const Formula& formula, int slab) {
    const int thread = Consumer<C>::thread(), lane = thread % kWarpSize;
    auto& sSlab = own.smem.slabs[own.group][slab];
    float* sSums = own.smem.sums.warp[own.group][slab][thread / kWarpSize];
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
      uint4* sBlock = sSlab.at(thread / kWarpSize * 16 + lane % 16, 2 * block + lane / 16);
      block_back<C>(sums, formula, sBlock, sSums + 16 * block, slab * kSlabFragments + 2 * block,
                    lane);
    }
  }

  // Each slab of a tile has its own place for sums: it is free again after the barriers of two
  // more.
  template <class C>
  static __device__ __forceinline__ void store_sums(const Consumer<C>& own, int slab, int row,
                                                    int column) {
    const int thread = Consumer<C>::thread(), at = column + thread;
    if (thread >= kSlabColumns || at >= own.args.N) return;
    const float sum = sum_of_warps(own.smem.sums.warp[own.group][slab], thread);
    own.args.layer.partial[int64_t{row / kGemmBlockM} * own.args.N + at] = sum;
  }
};

}  // namespace gemm
}  // namespace fused_lm
