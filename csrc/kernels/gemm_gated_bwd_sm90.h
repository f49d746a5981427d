// The epilogue that goes back through a gated activation. With d = a b^T,
//
//   dgate = d value act'(gate),   dvalue = d act(gate)
//
// and their sums over the rows of a tile, which are parts of dbias.
//
// As in gemm_activation_bwd_sm90.h, whose shared memory it has: results leave by the slabs that
// gates and values came into. Twice as many of them don't fit twice, so both groups use the same
// three pairs, a slab of a tile each, in turn. That takes no time as long as their epilogues don't
// overlap, which the other's products see to.
#pragma once

#include "kernels/gemm_activation_bwd_sm90.h"

namespace fused_lm {
namespace gemm {

struct GatedBackwardEpilogue {
  static constexpr int kParts = 2;  // gates and values

  template <class C>
  __device__ __forceinline__ void operator()(Consumer<C>& own, Sums<C>& sums, int row,
                                             int column) const {
    const Arguments& args = own.args;
    auto& barriers = own.smem.barriers;
#pragma unroll
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      const int first = column + slab * kSlabColumns;
      ptx::mbarrier_wait(&barriers.source_full[own.group][slab], own.source_parity);
      with_activation(args.layer.activation,
                      [&](const auto& formula) { slab_back<C>(own, sums, formula, slab); });
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kSlabWritten + own.group, kGroupThreads);
      if (Consumer<C>::thread() == 0) {
        ptx::tma_store(args.out, &own.smem.slabs[0][slab].chunks[0][0][0], {first, row});
        ptx::tma_store(args.out_values, &own.smem.slabs[1][slab].chunks[0][0][0], {first, row});
        ptx::bulk_commit();
        if (slab > 0) release<1>(barriers.source_empty[slab - 1]);
      }
      if (args.layer.partial != nullptr) store_sums<C>(own, slab, row, first);
    }
    own.source_parity ^= 1u;
    ptx::named_barrier_sync(kSlabWritten + own.group, kGroupThreads);
    if (Consumer<C>::thread() == 0) release<0>(barriers.source_empty[C::kSlabs - 1]);
  }

  // Behind a barrier of the group: all have added up the sums of the slab too.
  template <int kYounger>
  static __device__ __forceinline__ void release(uint64_t& empty) {
    ptx::bulk_wait_read<kYounger>();
    ptx::mbarrier_arrive(&empty);
  }

  template <class C, class Formula>
  static __device__ __forceinline__ void slab_back(Consumer<C>& own, const Sums<C>& sums,
                                                   const Formula& formula, int slab) {
    const int thread = Consumer<C>::thread(), warp = thread / kWarpSize, lane = thread % kWarpSize;
#pragma unroll
    for (int block = 0; block < kSlabBlocks; ++block) {
      uint4* sBlock[kParts];
      float* sSums[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        sBlock[part] = own.smem.slabs[part][slab].at(warp * 16 + lane % 16, 2 * block + lane / 16);
        sSums[part] = own.smem.sums.warp[part][slab][warp] + 16 * block;
      }
      block_back<C>(sums, formula, sBlock, sSums, slab * kSlabFragments + 2 * block, lane);
    }
  }

  // dgate and dvalue of 16 columns of a consumer's rows; their sums to sSums.
  template <class C, class Formula>
  static __device__ __forceinline__ void block_back(const Sums<C>& sums, const Formula& formula,
                                                    uint4* const (&sBlock)[kParts],
                                                    float* const (&sSums)[kParts], int fragment,
                                                    int lane) {
    constexpr DType kDType = kDTypeOf<typename C::Element>;
    float columns[kParts][4] = {};
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
      const int row_off = m * kProductRows * C::Slab::kSlabChunks;
      uint32_t gates[4], values[4];
      ptx::ldmatrix_x4(gates, sBlock[0] + row_off);
      ptx::ldmatrix_x4(values, sBlock[1] + row_off);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* own = &sums[m][fragment + i / 2][i % 2 * 2];
        float gate[2], value[2];
        widen_pair<kDType>(gate, gates[i]);
        widen_pair<kDType>(value, values[i]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float dvalue = own[e] * formula.value(gate[e]);
          gate[e] = own[e] * value[e] * formula.slope(gate[e]);
          value[e] = dvalue;
          columns[0][i / 2 * 2 + e] += gate[e];
          columns[1][i / 2 * 2 + e] += value[e];
        }
        gates[i] = narrow_pair<kDType>(gate[0], gate[1]);
        values[i] = narrow_pair<kDType>(value[0], value[1]);
      }
      ptx::stmatrix_x4(sBlock[0] + row_off, gates);
      ptx::stmatrix_x4(sBlock[1] + row_off, values);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_block_sums(sSums[part], columns[part], lane);
    }
  }

  // A thread per column, of gates or of values.
  template <class C>
  static __device__ __forceinline__ void store_sums(const Consumer<C>& own, int slab, int row,
                                                    int column) {
    static_assert(kGroupThreads == kParts * kSlabColumns);
    const int part = Consumer<C>::thread() / kSlabColumns;
    const int in_slab = Consumer<C>::thread() % kSlabColumns, at = column + in_slab;
    const Arguments& args = own.args;
    if (at >= args.N) return;
    const int64_t line = int64_t{row / kGemmBlockM} * kParts + part;
    args.layer.partial[line * args.N + at] = sum_of_warps(own.smem.sums.warp[part][slab], in_slab);
  }
};

}  // namespace gemm
}  // namespace fused_lm
