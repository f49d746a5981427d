// The backward of softmax attention for Hopper: what a launch needs beside what every GPU's does.
#pragma once

#include <initializer_list>

#include "kernels/attention.h"
#include "kernels/attention_bwd_order_sm90.h"
#include "kernels/attention_bwd_tuning_sm90.h"

namespace fused_lm {

// Room that the launches share, 16-byte aligned; in use until the last has ended.
struct HopperBackwardRoom {
  float* numbers;  // [B, H, tiles, 2 block_t + kHugeFloats]: of a tile lse, is huge, delta
  float* dq_sums;  // [slots or 1, B, H, tiles, block_t head_dim], as attention_bwd_rows_sm90.h says
  // 0: one launch for all keys, whose blocks add to the same sums of dq in any order. Otherwise
  // launches of so many tiles of keys, one after the other, each tile with sums of its own.
  int slots;
};

inline int hopper_backward_head_dim(const AttentionShape& shape) {
  return hopper_backward_head_dim(shape.D > shape.Dv ? shape.D : shape.Dv);
}

// How many floats of each, for whichever kernels run.
struct HopperBackwardSizes {
  int64_t numbers, dq_sums;
};

// tiles_of(block_t): of queries, of all heads.
template <class TilesOf>
HopperBackwardSizes hopper_backward_sizes(const AttentionShape& shape, const TilesOf& tiles_of) {
  const int head_dim = hopper_backward_head_dim(shape);
  HopperBackwardSizes most{0, 0};
  for (const HopperBackwardTuning& tuning :
       {attention_backward_tuning_sm90(head_dim, false),
        attention_backward_tuning_sm90(head_dim, true),
        attention_backward_tuning_sm90(head_dim, false, head_dim == 128)}) {
    const int block_t = tuning.block_t;
    const int64_t tiles = tiles_of(block_t);
    const int64_t numbers = tiles * (2 * block_t + kHugeFloats);
    const int64_t dq_sums = tiles * block_t * head_dim;
    most = {numbers > most.numbers ? numbers : most.numbers,
            dq_sums > most.dq_sums ? dq_sums : most.dq_sums};
  }
  return most;
}

inline HopperBackwardSizes hopper_backward_sizes(const AttentionShape& shape) {
  return hopper_backward_sizes(shape, [&](int block_t) {
    return (int64_t{shape.T} + block_t - 1) / block_t * shape.B * shape.H;
  });
}

// What decides on the slots of an attention that has keys and queries.
inline HopperBackwardWork hopper_backward_work(const AttentionShape& shape) {
  const int head_dim = hopper_backward_head_dim(shape);
  const int block_t = attention_backward_tuning_sm90(head_dim, false).block_t;
  const int block_s = hopper_backward_keys(head_dim);
  const auto tiles = [](int length, int block) { return (int64_t{length} + block - 1) / block; };
  return {tiles(shape.S, block_s), int64_t{shape.B} * (shape.H / shape.group),
          shape.group * tiles(shape.T, block_t),
          hopper_backward_sizes(shape).dq_sums * static_cast<int64_t>(sizeof(float)),
          hopper_backward_tile_clocks(head_dim)};
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
