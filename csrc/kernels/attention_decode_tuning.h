// Tiles of the decoding kernel and the number of splits: pure functions, a reason per row.
//
// From arithmetic and `python -m benchmarks.static`: no GPU has measured them. Every key is read
// once and multiplied with 16 rows, 16 FLOP per byte, so memory binds, and what counts is how many
// bytes are on their way. A multiprocessor of an H200 reads 36 bytes per ns, and waits some 700 ns
// for them: 26 KB must be under way, all the time; those of an A100 or a GeForce need less. With
// two stages a warp has one tile under way while it works on the other, so that two blocks have 48
// to 64 KB. By their instructions they work three times as fast as an H200 reads, at 128 columns.
#pragma once

#include "common/types.h"
#include "kernels/attention.h"
#include "kernels/attention_tuning.h"

namespace fused_lm {

// The head dims of attention_tuning.h.
struct DecodeTuning {
  int warps;          // each walks over tiles of its own
  int block_s;        // keys per tile
  int stages;         // tiles of k and v that a warp has room for
  int blocks_per_sm;  // that registers leave room for, and splits make
  QueryPlace queries;
  const char* reason;

  constexpr int threads() const { return warps * kWarpSize; }
};

constexpr int kDecodeRows = 16;  // of a block: what one product has

constexpr DecodeTuning attention_decode_tuning(int head_dim) {
  constexpr auto kHeld = QueryPlace::kRegisters;
  if (head_dim <= 32) return {4, 32, 3, 2, kHeld, "48 KB, tiles of 4 KB: two under way"};
  if (head_dim <= 64) return {4, 32, 2, 2, kHeld, "64 KB, tiles of 8 KB"};
  if (head_dim <= 96) return {4, 16, 2, 2, kHeld, "48 KB, tiles of 6 KB: 3 blocks on an H100"};
  if (head_dim <= 128) return {4, 16, 2, 2, kHeld, "64 KB, tiles of 8 KB"};
  if (head_dim <= 192) return {2, 16, 2, 2, kHeld, "48 KB, tiles of 12 KB; 4 warps exceed 99 KB"};
  return {2, 16, 2, 2, QueryPlace::kShared, "64 KB, tiles of 16 KB; q in 64 registers spills"};
}

constexpr int kMostSplits = 128;
constexpr int kLeastSteps = 4;  // tiles per warp and split, below which a start costs too much

// As many splits as give every multiprocessor its blocks, in one wave: a wave that is not full
// makes all wait for a few. No split is shorter than kLeastSteps tiles for each of its warps if the
// cache is full: it writes 4 Dv + 8 bytes per row, which are read again, where it reads 2 (D + Dv)
// per key. Of the lengths nothing is known here: kernels cut what a sequence has into as many
// parts.
constexpr int decode_splits(int64_t blocks, int64_t keys, const DecodeTuning& tuning,
                            int multiprocessors) {
  const int64_t least = int64_t{kLeastSteps} * tuning.warps * tuning.block_s;
  const int64_t most = keys / least < kMostSplits ? keys / least : kMostSplits;
  const int64_t room = int64_t{multiprocessors} * tuning.blocks_per_sm;
  const int64_t wanted = blocks < room && blocks > 0 ? room / blocks : 1;
  const int64_t splits = wanted < most ? wanted : most;
  return splits > 1 ? static_cast<int>(splits) : 1;
}

static_assert(decode_splits(32, 4096, attention_decode_tuning(128), 132) == 8, "two blocks each");
static_assert(decode_splits(8, 131072, attention_decode_tuning(128), 132) == 33, "two blocks each");
static_assert(decode_splits(8, 1000, attention_decode_tuning(128), 132) == 3, "256 keys each");
static_assert(decode_splits(300, 131072, attention_decode_tuning(128), 132) == 1, "full already");

// Blocks of 16 rows per key head.
constexpr int64_t decode_row_tiles(const AttentionShape& shape) {
  return (int64_t{shape.group} * shape.T + kDecodeRows - 1) / kDecodeRows;
}

// Into how many parts the keys of every sequence are cut.
constexpr int attention_decode_splits(const AttentionShape& shape, int multiprocessors) {
  const int64_t heads = int64_t{shape.B} * (shape.H / shape.group);
  const int head_dim = shape.D > shape.Dv ? shape.D : shape.Dv;
  return decode_splits(heads * decode_row_tiles(shape), shape.S, attention_decode_tuning(head_dim),
                       multiprocessors);
}

}  // namespace fused_lm
