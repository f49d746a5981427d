// The backward of attention inside each of several packed sequences: what a launch needs. Letters
// are those of attention_varlen.h.
#pragma once

#include "kernels/attention_bwd_hopper.h"
#include "kernels/attention_varlen.h"

namespace fused_lm {

struct AttentionVarlenBackwardParams {
  // As if all were one sequence: B = 1, T = N, S = M. Row t of a sequence sees its keys t + d +
  // score.lower .. t + d + score.upper; bounds that hide nothing are +-kMaxVarlenRows. No mask,
  // bias or dropout.
  AttentionBackwardParams p;
  SequenceBounds bounds_q, bounds_k;
  int sequences;
  bool aligned_at_end;
};

// How many floats of each room, for whichever kernels run: tiles of queries as in the forward.
inline HopperBackwardSizes varlen_backward_sizes(const AttentionVarlenBackwardParams& packed) {
  const AttentionShape& shape = packed.p.shape;
  return hopper_backward_sizes(shape, [&](int block_t) {
    return varlen_tiles(shape.T, packed.sequences, block_t) * shape.H;
  });
}

// dq, dk and dv of a query, a key and a sequence at least; the room has no slots. Weak: a build for
// other GPUs alone has none.
__attribute__((weak)) Status attention_varlen_backward_sm90_bf16(
    const AttentionVarlenBackwardParams& params, const HopperBackwardRoom& room, Stream stream);
__attribute__((weak)) Status attention_varlen_backward_sm90_fp16(
    const AttentionVarlenBackwardParams& params, const HopperBackwardRoom& room, Stream stream);

}  // namespace fused_lm
