// Tiles of the attention kernels of Hopper: pure functions of the head dim, a reason per row.
//
// A group of consumers, a warpgroup, owns 64 queries. Per thread scores are N / 2 registers for N
// keys, p N / 4, the sums D / 2. A multiprocessor has 512 registers for the threads of a scheduler
// in the same lane: 24 for the producer and 240 for each of two groups, or 32 and 160 for each of
// three.
//
// Per multiprocessor and clock: 4096 FLOP of the tensor cores, 128 bytes of shared memory, 16
// exponentials. q k^T reads (64 + N) 32 bytes in N / 2 clocks, so at N = 128 shared memory is busy
// for 75 % of them, p v for half. Exponentials take 64 / D of the time of the products, and issuing
// all instructions of the softmax 1/2 of it at D = 128. Keys per tile are as many as registers and
// shared memory hold, since votes, shuffles and barriers come once per tile; but a sequence is
// filled up to whole tiles, and of a tile on the diagonal half is wasted.
//
// Registers are the highest that ptxas of CUDA 13.0 uses, without a spill. No time has been
// measured.
#pragma once

#include "common/types.h"

namespace fused_lm {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroupRows = 64;      // that its products have

// What a kernel is compiled for. A band or general scores mask tiles, the full one ends of S alone.
enum class ForwardKind : int { kFull, kBand, kGeneral };

struct HopperTuning {
  int groups;    // of consumers
  int block_s;   // keys per tile
  int stages;    // tiles of k, and of v, in shared memory
  bool own_out;  // out has shared memory of its own: q of the next tile comes while it is stored
  const char* reason;

  constexpr int block_t() const { return groups * kGroupRows; }
  constexpr int threads() const { return (groups + 1) * kGroupThreads; }
  constexpr int producer_registers() const { return groups == 2 ? 24 : 32; }
  constexpr int consumer_registers() const { return groups == 2 ? 240 : 160; }
};

// Head dims that kernels are compiled for; others run in the next larger one, zeros beside them.
constexpr int kHopperHeadDims[] = {64, 96, 128, 192, 256};

constexpr bool has_full_kernel(int head_dim) { return head_dim == 128; }

constexpr HopperTuning attention_forward_tuning_sm90(int head_dim, ForwardKind kind) {
  // Features want registers of their own, and their loads hide nothing: no third group, no p beside
  // scores.
  if (kind == ForwardKind::kGeneral) {
    if (head_dim <= 64) return {2, 128, 2, true, "96 KB; sums 32, scores 64: 186 registers"};
    if (head_dim <= 96) return {2, 128, 2, true, "144 KB; sums 48, scores 64: 194 registers"};
    if (head_dim <= 128) return {2, 128, 2, true, "192 KB; sums 64, scores 64: 232 registers"};
    if (head_dim <= 192) return {2, 96, 2, false, "192 KB; sums 96, scores 48: 210 registers"};
    return {2, 80, 2, false, "224 KB; sums 128, scores 40: 232 registers"};
  }
  if (head_dim <= 64) {
    constexpr auto kWhy =
        "176 KB; sums 32, scores 64, p 32: 152 of 160 registers. Exponentials bind: three groups "
        "hide what stands between theirs";
    return {3, 128, 4, true, kWhy};
  }
  if (head_dim <= 96) {
    constexpr auto kWhy =
        "144 KB; sums 48, scores 64, p 32: 168 registers. Three groups would have 160";
    return {2, 128, 2, true, kWhy};
  }
  if (head_dim <= 128) {
    if (kind == ForwardKind::kFull) {
      constexpr auto kWhy =
          "208 KB, so out is where q was; sums 64, scores 88, p 44: 220 registers. 192 keys "
          "compile too, but fill up 1024 keys to 1152";
      return {2, 176, 2, false, kWhy};
    }
    constexpr auto kWhy = "192 KB; sums 64, scores 64, p 32: 184 registers; the diagonal";
    return {2, 128, 2, true, kWhy};
  }
  if (head_dim <= 192) {
    return {2, 112, 2, false, "216 KB; sums 96, scores 56, p 28: 204 registers"};
  }
  return {2, 80, 2, false, "224 KB; sums 128, scores 40, p 20: 221 registers"};
}

}  // namespace fused_lm
