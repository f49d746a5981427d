// Attention of a few new tokens to a KV cache: what a launch needs.
//
//   query t of sequence b stands at n - T + t, n = lens[b], and sees the keys
//   n - T + t + lower <= s <= n - T + t + upper,  0 <= s < n
//
// Letters: B sequences, H query heads, T queries, S the most keys that a cache has room for, D and
// Dv head dims of q, k and of v. The rows of a key head are its queries: row r is query r / group
// of head r % group.
//
// No torch here: csrc/attention_decode.cpp fills these in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"
#include "kernels/attention.h"

namespace fused_lm {

// A vector of int32 or int64 on the GPU.
struct Integers {
  const void* data;
  bool wide;
};

struct AttentionDecodeParams {
  const uint16_t* q;  // [B, H, T, D]
  const uint16_t* k;  // [B, H / group, S, D], or blocks [blocks, H / group, block_size, D]
  const uint16_t* v;  // the same with Dv columns
  uint16_t* out;      // [B, H, T, Dv]
  float* lse;         // [B, H, T], contiguous: natural log; -inf in rows without a key
  Integers lens;      // [B]
  Integers table;     // [B, S / block_size], contiguous, or null: then "blocks" are sequences
  float* partial;     // [splits, B H T, Dv]: sums of e^(score - max) v; null with one split
  float* extremes;    // [splits, B H T, 2]: max, and sum of e^(score - max), 0 without a key
  HeadStrides q_strides, k_strides, v_strides, out_strides;  // batch: of a block, if there are any
  AttentionShape shape;
  int blocks, block_size;
  int lower, upper;  // [-kMaxLengths, kMaxLengths] where they hide nothing
  float scale;
  float softcap;  // 0: none
  int splits;     // what attention_decode_splits says
};

// Tensors are bf16 or fp16.
Status attention_decode_bf16(const AttentionDecodeParams& params, Stream stream);
Status attention_decode_fp16(const AttentionDecodeParams& params, Stream stream);

}  // namespace fused_lm
