// Softmax attention: what a launch needs.
//
//   score = softcap(scale * q.k) + bias;  P = softmax(score);  out = dropout(P) v
//
// Letters: B batches, H query heads, T queries, S keys, D and Dv head dims of q, k and of v.
// No torch here: csrc/attention.cpp fills these in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace fused_lm {

constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimStep = 8;                   // rows of 16 bytes
constexpr int64_t kMaxLengths = INT32_MAX - 256;  // of T + S: tiles end behind them
constexpr int kMaxHeads = 65535;                  // what a dimension of a grid has
constexpr int kMaxGridBatches = 65535;            // more batches are more launches

// Elements between neighbours of a [B, H, T, D] tensor whose columns are adjacent. Rows start at
// multiples of 16 bytes.
struct HeadStrides {
  int64_t batch, head, row;
};

// Elements between neighbours of a tensor that broadcasts to [B, H, T, S]: 0 where it does.
struct ScoreStrides {
  int64_t batch, head, row, col;
};

struct AttentionShape {
  int B, H;
  int group;  // query heads per key-value head
  int T, S, D, Dv;
};

// How q.k becomes a score, and which scores count.
struct ScoreParams {
  const uint8_t* mask;      // bool [B, H, T, S] or null; 0 hides a key
  const uint8_t* key_mask;  // bool [B, S] or null
  const void* bias;         // [B, H, T, S] or null
  ScoreStrides mask_strides, key_mask_strides, bias_strides;
  DType bias_dtype;
  bool mask_octets;  // 8 elements of a row, from a multiple of 8 on, are adjacent, aligned, and
  bool bias_pairs;   // inside or outside of it together; or 2: one load for all of them
  int lower, upper;  // row t sees keys t + lower .. t + upper; [-T, S] where they hide nothing
  float scale;
  float scale_log2;  // scale log2(e)
  float softcap;     // 0: none
};

struct AttentionForwardParams {
  const uint16_t* q;  // [B, H, T, D]
  const uint16_t* k;  // [B, H / group, S, D]
  const uint16_t* v;  // [B, H / group, S, Dv]
  uint16_t* out;      // [B, H, T, Dv]
  float* lse;         // [B, H, T], contiguous: natural log; -inf in rows without a key
  HeadStrides q_strides, k_strides, v_strides, out_strides;
  AttentionShape shape;
  ScoreParams score;
  DropoutParams dropout;
};

// q, k, v and dout as above; lse as the forward stored it.
struct AttentionBackwardParams {
  const uint16_t* q;     // [B, H, T, D]
  const uint16_t* k;     // [B, H / group, S, D]
  const uint16_t* v;     // [B, H / group, S, Dv]
  const uint16_t* out;   // [B, H, T, Dv]
  const uint16_t* dout;  // [B, H, T, Dv]
  const float* dlse;     // [B, H, T] or null: gradient that arrives at lse itself
  const float* lse;      // [B, H, T], contiguous
  float* row_lse;        // [B, H, T]: lse, but +inf where it is -inf: P is 0 there
  float* delta;          // [B, H, T]: rowsum(dout * out) - dlse
  uint16_t* dq;          // [B, H, T, D]
  uint16_t* dk;          // [B, H / group, S, D]
  uint16_t* dv;          // [B, H / group, S, Dv]
  HeadStrides q_strides, k_strides, v_strides, out_strides, dout_strides;
  HeadStrides dq_strides, dk_strides, dv_strides;
  HeadStrides dlse_strides;
  AttentionShape shape;
  ScoreParams score;
  DropoutParams dropout;
};

// Tensors are bf16 or fp16. shared_bytes: what a block of the current GPU may have.
Status attention_forward_bf16(const AttentionForwardParams& params, size_t shared_bytes,
                              Stream stream);
Status attention_forward_fp16(const AttentionForwardParams& params, size_t shared_bytes,
                              Stream stream);

// The same for Hopper, by TMA and wgmma: what attention_forward_sm90_takes. The counter is one int
// on the GPU, in use until the kernel has ended. Weak: a build for other GPUs alone has none.
__attribute__((weak)) Status attention_forward_sm90_bf16(const AttentionForwardParams& params,
                                                         int multiprocessors, int* tile_counter,
                                                         Stream stream);
__attribute__((weak)) Status attention_forward_sm90_fp16(const AttentionForwardParams& params,
                                                         int multiprocessors, int* tile_counter,
                                                         Stream stream);

// Whether a tensor map can describe a [B, heads, length, D] tensor: no dimension is expanded, and
// rows lie less than 2^40 bytes apart.
inline bool maps_heads(const HeadStrides& strides, int B, int heads, int length) {
  constexpr int64_t kElements = int64_t{1} << 39;
  const auto fits = [](int size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < kElements);
  };
  return fits(B, strides.batch) && fits(heads, strides.head) && fits(length, strides.row);
}

inline bool attention_forward_sm90_takes(const AttentionForwardParams& p) {
  constexpr int64_t kSmallestTile = 128, kMostTiles = INT32_MAX / 2;
  const AttentionShape& shape = p.shape;
  if (shape.T == 0 || shape.S == 0) return false;
  const int64_t tiles = (shape.T + kSmallestTile - 1) / kSmallestTile;
  const int64_t heads = int64_t{shape.B} * shape.H;
  if (heads > kMostTiles / tiles) return false;
  const int kv_heads = shape.H / shape.group;
  return maps_heads(p.q_strides, shape.B, shape.H, shape.T) &&
         maps_heads(p.k_strides, shape.B, kv_heads, shape.S) &&
         maps_heads(p.v_strides, shape.B, kv_heads, shape.S) &&
         maps_heads(p.out_strides, shape.B, shape.H, shape.T);
}

// The backward, in this order: delta and row_lse; then dk and dv, and dq, which need them.
Status attention_delta_bf16(const AttentionBackwardParams& params, Stream stream);
Status attention_delta_fp16(const AttentionBackwardParams& params, Stream stream);
Status attention_dkdv_bf16(const AttentionBackwardParams& params, size_t shared_bytes,
                           Stream stream);
Status attention_dkdv_fp16(const AttentionBackwardParams& params, size_t shared_bytes,
                           Stream stream);
Status attention_dq_bf16(const AttentionBackwardParams& params, size_t shared_bytes, Stream stream);
Status attention_dq_fp16(const AttentionBackwardParams& params, size_t shared_bytes, Stream stream);

// The weights as a tensor, from the lse of a forward.
struct AttentionWeightsParams {
  const uint16_t* q;  // [B, H, T, D]
  const uint16_t* k;  // [B, H / group, S, D]
  const float* lse;   // [B, H, T], contiguous
  uint16_t* weights;  // [B, H, T, S], or their mean over heads [B, T, S]; contiguous
  HeadStrides q_strides, k_strides;
  AttentionShape shape;  // Dv is not used
  ScoreParams score;
  DropoutParams dropout;
  bool average_heads;
};

Status attention_weights_bf16(const AttentionWeightsParams& params, Stream stream);
Status attention_weights_fp16(const AttentionWeightsParams& params, Stream stream);

// Sizes of a bias: those of the scores, or 1 where it broadcasts.
struct BiasSizes {
  int B, H, T, S;
};

// The gradient of the bias, from what a backward has.
struct AttentionDbiasParams {
  const uint16_t* q;     // [B, H, T, D]
  const uint16_t* k;     // [B, H / group, S, D]
  const uint16_t* v;     // [B, H / group, S, Dv]
  const uint16_t* dout;  // [B, H, T, Dv]
  const float* lse;      // [B, H, T], contiguous
  const float* delta;    // [B, H, T], contiguous: rowsum(dout out) - dlse
  void* dbias;           // of sizes, contiguous, of score.bias_dtype
  BiasSizes sizes;
  HeadStrides q_strides, k_strides, v_strides, dout_strides;
  AttentionShape shape;
  ScoreParams score;
  DropoutParams dropout;
};

Status attention_dbias_bf16(const AttentionDbiasParams& params, Stream stream);
Status attention_dbias_fp16(const AttentionDbiasParams& params, Stream stream);

}  // namespace fused_lm
