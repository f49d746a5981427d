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
// Registers that the code of CUDA 13.0 uses, without a spill, by head dim: plain 152, 169, 184,
// 212, 226; general 197, 200, 218, 210, 232. Where a reason says another number it is an estimate,
// and stays until the next record: reasons are part of what a record speaks for. Times are an
// H200's, bf16 (benchmarks/LOG.md, 2026-11-27).
#pragma once

#include "common/types.h"

namespace fused_lm {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroupRows = 64;      // that its products have

struct HopperTuning {
  int groups;   // of consumers
  int block_s;  // keys per tile
  int stages;   // tiles of k, and of v, in shared memory
  int queries;  // tiles of q there: 2, and out has a place of its own; or 1, in out's place
  const char* reason;

  constexpr int block_t() const { return groups * kGroupRows; }
  constexpr bool own_out() const { return queries > 1; }
  constexpr int threads() const { return (groups + 1) * kGroupThreads; }
  constexpr int producer_registers() const { return groups == 2 ? 24 : 32; }
  constexpr int consumer_registers() const { return groups == 2 ? 240 : 160; }
};

// Head dims that kernels are compiled for; others run in the next larger one, zeros beside them.
constexpr int kHopperHeadDims[] = {64, 96, 128, 192, 256};

// general: with mask, key mask, bias, softcap, dropout or a scale that isn't positive.
constexpr HopperTuning attention_forward_tuning_sm90(int head_dim, bool general) {
  // Features want registers of their own, and their loads hide nothing: no third group, no p beside
  // scores.
  if (general) {
    if (head_dim <= 64) return {2, 128, 2, 2, "112 KB; sums 32, scores 64: 186 registers"};
    if (head_dim <= 96) return {2, 128, 2, 2, "168 KB; sums 48, scores 64: 194 registers"};
    if (head_dim <= 128) return {2, 128, 2, 2, "224 KB; sums 64, scores 64: 232 registers"};
    if (head_dim <= 192) return {2, 96, 2, 1, "192 KB; sums 96, scores 48: 210 registers"};
    return {2, 80, 2, 1, "224 KB; sums 128, scores 40: 232 registers"};
  }
  if (head_dim <= 64) {
    constexpr auto kWhy =
        "200 KB; sums 32, scores 64, p 32: 156 of 160 registers. Exponentials bind: three groups "
        "hide what stands between theirs, which two don't, with 128 keys or 176 (-16 to -20 %)";
    return {3, 128, 4, 2, kWhy};
  }
  if (head_dim <= 96) {
    constexpr auto kWhy =
        "168 KB; sums 48, scores 64, p 32: 172 registers. Three groups would have 160";
    return {2, 128, 2, 2, kWhy};
  }
  if (head_dim <= 128) {
    constexpr auto kWhy =
        "224 KB; sums 64, scores 64, p 32: 188 registers. 176 keys, for which there is no second q "
        "and no place for out, are 1.5 % faster at 16k keys, and 4 % slower at 4k, 24 % at 512";
    return {2, 128, 2, 2, kWhy};
  }
  if (head_dim <= 192) {
    return {2, 112, 2, 1, "216 KB; sums 96, scores 56, p 28: 208 registers"};
  }
  return {2, 80, 2, 1, "224 KB; sums 128, scores 40, p 20: 225 registers"};
}

}  // namespace fused_lm
