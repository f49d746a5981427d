// Attention inside each of several sequences that lie packed: what a launch needs.
//
//   query t of sequence i, row bounds_q[i] + t of q, sees keys t + d + lower <= s <= t + d + upper
//   of its sequence, 0 <= s < S;  d = S - T where bands are aligned at the end, else 0
//
// Letters: N rows of q and M rows of k in all, H query heads, D and Dv head dims of q, k and of v;
// of a sequence T queries and S keys.
// No torch here: csrc/attention_varlen.cpp fills these in.
#pragma once

#include "kernels/attention.h"

namespace fused_lm {

// Where sequences begin and, last, where all end: int32 or int64 [sequences + 1] on the GPU. Nobody
// has looked into it: kernels keep to 0 .. rows whatever it says.
struct SequenceBounds {
  const void* data;
  bool wide;
  int rows;  // N or M
};

struct AttentionVarlenParams {
  const uint16_t* q;  // [N, H, D]
  const uint16_t* k;  // [M, H / group, D]
  const uint16_t* v;  // [M, H / group, Dv]
  uint16_t* out;      // [N, H, Dv]
  float* lse;         // [H, N], contiguous: natural log; -inf in rows without a key
  SequenceBounds bounds_q, bounds_k;
  HeadStrides q_strides, k_strides, v_strides, out_strides;  // batch: 0
  int sequences;
  int H;
  int group;  // query heads per key-value head
  int D, Dv;
  int lower, upper;  // -kMaxVarlenRows or kMaxVarlenRows where they hide nothing
  bool aligned_at_end;
  float scale;
  float scale_log2;  // scale log2(e)
  float softcap;     // 0: none
};

// So many rows of q, and of k: with a bound and a difference of two lengths they still are an int.
constexpr int kMaxVarlenRows = (1 << 29) - 1;
constexpr int kSmallestVarlenTile = 128;  // queries

// Tiles of all sequences, of one head: see attention_varlen_tiles_sm90.h.
constexpr int64_t varlen_tiles(int64_t rows, int64_t sequences, int block_t) {
  return rows / block_t + sequences;
}

// The counter is one int on the GPU, in use until the kernel has ended. Weak: a build for other
// GPUs alone has none. There is a query, a key and a sequence at least.
__attribute__((weak)) Status attention_varlen_sm90_bf16(const AttentionVarlenParams& params,
                                                        int multiprocessors, int* tile_counter,
                                                        Stream stream);
__attribute__((weak)) Status attention_varlen_sm90_fp16(const AttentionVarlenParams& params,
                                                        int multiprocessors, int* tile_counter,
                                                        Stream stream);

}  // namespace fused_lm
