// Tiles of Hopper's attention backward: pure functions of the head dim, a reason per row. None has
// run on a GPU yet.
//
// Up to 128 columns a block owns 128 keys, 64 for each of two groups of consumers (warpgroups),
// which have 240 registers per thread. Per thread, with M queries per tile: scores M / 2 and dP M /
// 2, of which one is free again when dq, as many, is made; dk and dv D / 2 each.
//
// Per multiprocessor and clock: 4096 FLOP of the tensor cores, 128 bytes of shared memory. Five
// products of a tile take 5 * 2 * 128 M D / 4096 clocks: 2560 at M D = 8192. wgmma reads both
// operands of scores, dP and dq there, 64 KB each, one of dv and dk, 32 KB each; ds is written, 16
// KB; q and dout come in, 32 KB, lse and delta are read, 16 KB; and dq, as floats, is written and
// read, 64 KB, if it is added from there. So shared memory binds: 3072 clocks, or 2560 if dq is
// added from registers; what threads do besides is 144 more. Exponentials take 512.
//
// Of 80 queries the tensor cores have 3200 clocks to do, shared memory 3648: 5 % less per query
// than of 64. Where a band ends in tiles more of them is in vain; so attentions without one take
// 80, at 128 columns, unless too many are behind the last query.
//
// Of 64 columns and 128 queries exponentials take 1024 clocks of 3072, and while both groups make
// them the tensor cores have nothing but dP to do. With dq and dk of the tile before held back they
// have enough; their registers leave room for 96 queries: 1920 clocks of the tensor cores, 2432 of
// shared memory, 768 of exponentials. A model of both groups, clock by clock with 40 for each
// latency, has the tensor cores busy for 78 % of the time so, and for 69 % with 128 queries that
// hold nothing back. At 128 columns the sums leave no room for it.
//
// There the groups may be skewed instead: the second issues its scores and dP when the first has
// issued its own, so that the exponentials of the one run beside products of the other, rather than
// all of them at once. It costs a barrier per tile that only the second group waits at. The same
// model has it at 97 % instead of 87; no GPU has told yet, so tiles of 80 queries do it, and those
// of 64 don't.
//
// Of 96 columns dq^T is made as 128: a quarter of this product is wasted, so the tensor cores have
// 3072 clocks to do for 96 queries, shared memory 2848, and 3424 if dq were added from there; for
// 64 queries 2048, 2112 and 2432, and half again as many barriers. dq = ds k wastes nothing, shared
// out as 64 columns and 32; but two kinds of product are two branches, and ptxas serialises them.
//
// Above 128 columns dk and dv of 64 keys would have D registers per thread of a group. The groups
// share 64 keys, half of the columns each. Clocks of the tensor cores and of shared memory per
// tile, dq from registers, by queries and keys of a tile and groups:
//
//               128 x 64, 2     64 x 64, 2     64 x 80, 2     64 x 96, 3
//   D = 192     3840, 4272      1920, 2752     -              2880, 4032
//   D = 256     5120, 5424      2560, 3424     3200, 4230     -
//
// What tells is the least product, of scores: 64 by 64 per group, or 64 by 32. dq adds 128 KB at
// D = 256 as floats, in shared memory 2048 clocks more. The price of 64 keys is traffic: at the
// tensor cores' full rate 26 bytes per clock come from the L2 and as many sums go there, twice
// those of 128 keys, and a quarter more than of 80.
#pragma once

#include "common/types.h"

namespace fused_lm {

// How the sums of dq reach global memory.
enum class GradientAdds : int {
  kBulk,       // through shared memory, by cp.reduce.async.bulk: a thread of the producer waits
  kRegisters,  // red.v4: what fence.proxy.async waits for afterwards is longer under way
};

// When a group's products of a tile of queries are made.
enum class BackwardSchedule : int {
  kTogether,  // both groups' at the same time
  kSkewed,    // scores and dP of the second group behind those of the first
  kHeldBack,  // dq and dk beside the exponentials of the next tile
};

struct HopperBackwardTuning {
  int block_t;  // queries per tile
  GradientAdds adds;
  BackwardSchedule schedule;
  const char* reason;
};

constexpr int kHugeFloats = 4;  // behind the lse of a tile, one of them used: whether any is huge

// Head dims that kernels are compiled for; others run in the next larger one, zeros beside them.
constexpr int kHopperBackwardHeadDims[] = {64, 96, 128, 192, 256};
constexpr int kMaxHopperBackwardDim = 256;
constexpr int hopper_backward_head_dim(int dim) {
  return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
}
constexpr int kWideBackwardDim = 128;  // above, the kernels of attention_bwd_wide_sm90.h
// Of a block.
constexpr int hopper_backward_keys(int head_dim) { return head_dim <= kWideBackwardDim ? 128 : 64; }
// Of a tile of the plain kernels, as above: what the busiest unit takes.
constexpr int hopper_backward_tile_clocks(int head_dim) {
  return head_dim <= 64                 ? 2432
         : head_dim <= kWideBackwardDim ? 3072
         : head_dim <= 192              ? 4272
                                        : 5424;
}

// Whether tiles of 80 queries are better where no band hides a key. T: queries of a head.
constexpr bool hopper_backward_takes_long(int head_dim, int T) {
  constexpr int64_t kLong = 80, kLongClocks = 3648, kShort = 64, kShortClocks = 3072;
  return head_dim == 128 &&
         (T + kLong - 1) / kLong * kLongClocks < (T + kShort - 1) / kShort * kShortClocks;
}

// general: with mask, key mask, bias, softcap, dropout or a scale that isn't positive. is_long: not
// general, and hopper_backward_takes_long.
constexpr HopperBackwardTuning attention_backward_tuning_sm90(int head_dim, bool general,
                                                              bool is_long = false) {
  using Adds = GradientAdds;
  using Schedule = BackwardSchedule;
  if (is_long) {
    return {80, Adds::kBulk, Schedule::kSkewed,
            "227 KB; scores 40, dP 40, sums 128. No band: 5 % less to read"};
  }
  if (head_dim <= 64) {
    if (general) {
      return {64, Adds::kRegisters, Schedule::kTogether,
              "81 KB; 64 queries are the 32 bits of a dropout word"};
    }
    return {96, Adds::kBulk, Schedule::kHeldBack,
            "155 KB; scores 48, dP 48, ds 24, dq 24, sums 64. 128 held back spill"};
  }
  if (head_dim <= 96) {
    if (general) {
      return {64, Adds::kRegisters, Schedule::kTogether,
              "130 KB; 64 queries are the 32 bits of a dropout word"};
    }
    return {96, Adds::kRegisters, Schedule::kTogether,
            "171 KB; scores 48, dP 48, sums 96. As fast as 64 by arithmetic, fewer barriers"};
  }
  if (head_dim > 192) {
    return {128, Adds::kRegisters, Schedule::kTogether,
            "227 KB, one place for q and one for dout; scores 32, dP 32, sums 128, dq 64"};
  }
  if (head_dim > 128) {
    return {128, Adds::kRegisters, Schedule::kTogether,
            "227 KB, two places for q and one for dout; scores 32, dP 32, sums 96, dq 48"};
  }
  if (general) {
    return {64, Adds::kBulk, Schedule::kTogether, "194 KB; scores 32, dP 32, sums 128"};
  }
  return {64, Adds::kBulk, Schedule::kTogether,
          "194 KB; scores 32, dP 32, sums 128. 80 would waste more on the diagonal"};
}

}  // namespace fused_lm
