// Backward of attention inside each of several packed sequences, for Hopper: that of
// attention_bwd_sm90.h and attention_bwd_wide_sm90.h, whose consumers these kernels run. What
// differs:
//
// Grid: one block per (virtual tile of keys, key-value head), of which each belongs to one
// sequence; attention_sequences.h says which, from the bounds alone. Lengths are never read on the
// host. Tiles of queries, and with them the sums of dq, are virtual ones too. Empty ones end at
// once.
//
// To consumers a block works on an attention of one batch, with T and S of its sequence: rows and
// keys are counted from the sequence's begin, and only copies know where that is.
//
// Boxes of TMA know nothing of sequences. In a tile in which one ends lie rows of the next, which
// may be NaN, and all of k, v, q and dout are summed over in some product, where 0 NaN is not 0. So
// such a tile comes to a barrier of a warp of the producer's, which writes zeros over those rows
// and then tells the consumers. Of dk and dv 64 rows of a sequence are a box; of fewer, a group
// stores 16 bytes a lane.
//
// clang-format off
// Barrier              who arrives                            who waits, and what for
//   k_raw v_raw        producer; bytes of the tile            the cutting warp: a tile in which a
//   q_raw dout_raw     .. and of lse or delta                 sequence ends
//   k_full .. dout_full  of other tiles; or the cutting warp  consumers: the tile
// clang-format on
// and the others as there.
//
// Bounds that don't rise from 0 to the rows of q or k give results without a meaning, and no access
// outside of the tensors: every one is clamped, and rows are counted.
//
// dq has no slots: what has to repeat bitwise goes one sequence after the other.
//
// Bytes: as there, of each sequence, but whole boxes where one ends; and per virtual tile up to 32
// bounds per round of the search, and 4.
#pragma once

#include "kernels/attention_bwd_sm90.h"
#include "kernels/attention_bwd_wide_sm90.h"
#include "kernels/attention_varlen_bwd_producer_sm90.h"

namespace fused_lm {
namespace attention_bwd {

template <int kHeadDim, bool kGeneral>
using PackedBackwardConfig =
    PackedConfig<std::conditional_t<(kHeadDim > kWideBackwardDim), WideConfig<kHeadDim, kGeneral>,
                                    HopperConfig<kHeadDim, kGeneral>>>;

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__((PackedBackwardConfig<kHeadDim, kGeneral>::kThreads), 1)
    attention_varlen_bwd_sm90(const __grid_constant__ PackedBackwardParams told, int) {
  using C = PackedBackwardConfig<kHeadDim, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionVarlenBackwardParams& packed = told.packed;
  const int key_head = static_cast<int>(blockIdx.y);
  const int sequence =
      sequence_of<C::kBlockS>(packed.bounds_k, packed.sequences, static_cast<int>(blockIdx.x));
  const PackedRows k = rows_of(packed.bounds_k, sequence);
  const int tile = static_cast<int>(blockIdx.x) - (k.begin / C::kBlockS + sequence);
  if (tile < 0 || tile * C::kBlockS >= k.length) return;
  if (threadIdx.x == 0) {
    const PackedRows q = rows_of(packed.bounds_q, sequence);
    const ScoreParams& score = packed.p.score;
    smem.packed.sequence = {q, k, bound_of_sequence(score.lower, q, k, packed.aligned_at_end),
                            bound_of_sequence(score.upper, q, k, packed.aligned_at_end)};
    init_raw_barriers<C>(smem);
  }
  start_block<C>(smem, told.maps);
  const QueryWalk<C> walk = packed_walk<C>(told, smem.packed.sequence, sequence, tile, key_head);
  if (threadIdx.x < kGroupThreads) {
    ptx::registers_decrease<24>();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (walk.empty()) return;
    if (threadIdx.x == 0) produce_packed<C>(smem, told, walk, key_head);
    if constexpr (C::kBulkAdds) {
      if ((warp == 1 || warp == 2) && threadIdx.x % kWarpSize == 0) {
        add_gradients<C>(smem, told, walk, warp - 1);
      }
    }
    if (warp == 3) cut_tiles<C>(smem, walk);
  } else {
    ptx::registers_increase<240>();
    if constexpr (kHeadDim > kWideBackwardDim) {
      consume_wide<Element, C>(smem, told, walk, key_head);
    } else {
      consume<Element, C>(smem, told, walk, key_head);
    }
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
