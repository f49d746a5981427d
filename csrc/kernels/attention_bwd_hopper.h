// The backward of softmax attention for Hopper: what a launch needs beside what every GPU's does.
#pragma once

#include <initializer_list>

#include "kernels/attention.h"
#include "kernels/attention_bwd_tuning_sm90.h"

namespace fused_lm {

// Room that the launches share, 16-byte aligned; in use until the last has ended.
struct HopperBackwardRoom {
  float* numbers;  // [B, H, tiles, 2 block_t + kHugeFloats]: of a tile lse, is huge, delta
  float* dq_sums;  // [B, H, tiles, block_t head_dim]: in the order of attention_bwd_rows_sm90.h
};

inline int hopper_backward_head_dim(const AttentionShape& shape) {
  return hopper_backward_head_dim(shape.D > shape.Dv ? shape.D : shape.Dv);
}

// How many floats of each, for whichever kernels run.
struct HopperBackwardSizes {
  int64_t numbers, dq_sums;
};

inline HopperBackwardSizes hopper_backward_sizes(const AttentionShape& shape) {
  const int head_dim = hopper_backward_head_dim(shape);
  HopperBackwardSizes most{0, 0};
  for (const bool general : {false, true}) {
    const int block_t = attention_backward_tuning_sm90(head_dim, general).block_t;
    const int64_t tiles = (int64_t{shape.T} + block_t - 1) / block_t * shape.B * shape.H;
    const int64_t numbers = tiles * (2 * block_t + kHugeFloats);
    const int64_t dq_sums = tiles * block_t * head_dim;
    most = {numbers > most.numbers ? numbers : most.numbers,
            dq_sums > most.dq_sums ? dq_sums : most.dq_sums};
  }
  return most;
}

// The compiled head dim that holds D and Dv, and whether tensor maps can describe the tensors.
inline bool attention_backward_sm90_takes(const AttentionBackwardParams& p) {
  const AttentionShape& shape = p.shape;
  if (shape.T == 0 || shape.S == 0 || shape.B == 0 || shape.H == 0) return false;
  if (shape.D > kMaxHopperBackwardDim || shape.Dv > kMaxHopperBackwardDim) return false;
  const int heads = shape.H / shape.group;
  return maps_heads(p.q_strides, shape.B, shape.H, shape.T) &&
         maps_heads(p.dout_strides, shape.B, shape.H, shape.T) &&
         maps_heads(p.k_strides, shape.B, heads, shape.S) &&
         maps_heads(p.v_strides, shape.B, heads, shape.S) &&
         maps_heads(p.dk_strides, shape.B, heads, shape.S) &&
         maps_heads(p.dv_strides, shape.B, heads, shape.S);
}

// The kernels above 128 columns, which the next two call: they compile beside the others.
Status attention_backward_wide_sm90_bf16(const AttentionBackwardParams& params,
                                         const HopperBackwardRoom& room, Stream stream);
Status attention_backward_wide_sm90_fp16(const AttentionBackwardParams& params,
                                         const HopperBackwardRoom& room, Stream stream);

// dq, dk and dv of what attention_backward_sm90_takes. delta and row_lse of p are not used. Weak: a
// build for other GPUs alone has none.
__attribute__((weak)) Status attention_backward_sm90_bf16(const AttentionBackwardParams& params,
                                                          const HopperBackwardRoom& room,
                                                          Stream stream);
__attribute__((weak)) Status attention_backward_sm90_fp16(const AttentionBackwardParams& params,
                                                          const HopperBackwardRoom& room,
                                                          Stream stream);

}  // namespace fused_lm
