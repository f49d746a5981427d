// Before and after the packed backward, a block per virtual tile of queries and head: what
// attention_bwd_rows_sm90.h does, for a tile of one sequence. Empty ones have nothing to do.
#pragma once

#include "kernels/attention_bwd_rows_sm90.h"
#include "kernels/attention_varlen_bwd_tiles_sm90.h"

namespace fused_lm {
namespace attention_bwd {

struct PackedRowsParams {
  AttentionVarlenBackwardParams packed;
  HopperBackwardRoom room;
};

// Calls body(p, tile, index) for the block's tile of queries, if its sequence has any of it: p is
// an attention of that sequence's queries and one head, and index where numbers and sums are.
template <class C, class Body>
__device__ __forceinline__ void with_packed_tile(const AttentionVarlenBackwardParams& packed,
                                                 const Body& body) {
  const int virtual_tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int sequence = sequence_of<C::kBlockT>(packed.bounds_q, packed.sequences, virtual_tile);
  const PackedRows q = rows_of(packed.bounds_q, sequence);
  const int tile = virtual_tile - (q.begin / C::kBlockT + sequence);
  if (tile < 0 || tile * C::kBlockT >= q.length) return;
  const AttentionBackwardParams& all = packed.p;
  const auto moved = [&](const auto* base, const HeadStrides& strides) {
    return base + head_offset(strides, 0, head) + q.begin * strides.row;
  };
  AttentionBackwardParams p{};
  p.shape = {1, 1, 1, q.length, 0, all.shape.D, all.shape.Dv};
  p.score.scale = all.score.scale;
  p.out = moved(all.out, all.out_strides), p.out_strides = all.out_strides;
  p.dout = moved(all.dout, all.dout_strides), p.dout_strides = all.dout_strides;
  p.dq = all.dq + head_offset(all.dq_strides, 0, head) + q.begin * all.dq_strides.row;
  p.dq_strides = all.dq_strides;
  p.lse = all.lse + static_cast<int64_t>(head) * all.shape.T + q.begin;
  if (all.dlse != nullptr) p.dlse = moved(all.dlse, all.dlse_strides);
  p.dlse_strides = all.dlse_strides;
  body(p, BlockTile{tile, 0, 0}, static_cast<int64_t>(head) * gridDim.x + virtual_tile);
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kRowsThreads)
    attention_varlen_bwd_prepare(const __grid_constant__ PackedRowsParams rows, int) {
  using C = BackwardConfig<kHeadDim, kGeneral>;
  with_packed_tile<C>(rows.packed,
                      [&](const AttentionBackwardParams& p, const BlockTile& block, int64_t tile) {
                        prepare_tile<Element, C>(p, rows.room, block, tile);
                      });
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kRowsThreads)
    attention_varlen_bwd_finish(const __grid_constant__ PackedRowsParams rows, int) {
  using C = BackwardConfig<kHeadDim, kGeneral>;
  auto& smem = dynamic_smem<DqRows<C>>();
  with_packed_tile<C>(rows.packed,
                      [&](const AttentionBackwardParams& p, const BlockTile& block, int64_t tile) {
                        finish_tile<Element, C>(smem, p, rows.room, block, tile);
                      });
}

}  // namespace attention_bwd
}  // namespace fused_lm
