// Tiles of Hopper's matrix products: pure functions of the sizes, a reason per row. None has run on
// a GPU yet; the bounds are arithmetic.
//
// Per multiprocessor and clock: 4096 FLOP of the tensor cores, 128 bytes of shared memory. A tile
// [128, N] and 64 of K take 2 * 128 * N * 64 / 4096 = 4 N clocks of the tensor cores. Meanwhile TMA
// writes (128 + N) * 128 bytes, and wgmma reads both operands, 64 rows at a time, where the b of 64
// rows is read again for the other 64: (128 + 2 N) * 128. Together (256 + 3 N) clocks at 128 bytes
// each: 640 for 128 columns, where the tensor cores take 512; 832 and 768 for 192; 1024 and 1024
// for 256.
//
// So wide tiles are better, until their epilogue is in the way. Two consumers that share a tile
// ("cooperative") hold 128 sums per thread at 256 columns, and both run the epilogue while the
// tensor cores wait. Two that have a tile each ("ping-pong") hold 192 at 192 columns, and the
// epilogue of one runs beside the products of the other: it costs nothing from a K of 576 on.
//
// All of it comes from the L2, at full rate 48 bytes per clock and multiprocessor for 256 columns,
// 53 for 192, 64 for 128: which it hardly has; nobody has measured it here yet. Two blocks, one
// below the other, need the same b. As a cluster each brings half of it for both, which leaves 32
// and 37 bytes. Where the rows of tiles are odd in number one block of each last cluster works in
// vain.
//
// A gated layer's tile of 256 columns is 128 of gates and the 128 of their values. Its epilogue,
// 2900 clocks of both consumers for SwiGLU, is not hidden: that is 4 % of the time at a K of 4096,
// 15 at 1024. In ping-pong it would be, but tiles of 64 and 64 columns lose a fifth to shared
// memory, whatever K is, and of 96 and 96 no turned operand is made of whole slabs.
//
// Tiles come in waves of as many as there are multiprocessors. The gradient of a weight [3072, 768]
// has 72 of 128 x 256, or 144 of 128 x 128, which is 12 more than an H200 takes at once: either way
// it takes 262 thousand clocks for 16384 tokens, or 1.8 times what all multiprocessors together
// would. Shared out, 203 parts in slots of 128 KB, it takes 143 thousand, and 24 more for their
// sums. What is done first is decided by these clocks.
#pragma once

#include <initializer_list>

#include "kernels/gemm.h"

namespace fused_lm {

enum class GemmSchedule : int { kCooperative256, kPingPong192, kPingPong128, kPingPong192Loads };

struct GemmTuning {
  GemmSchedule schedule;
  int block_n;
  bool ping_pong;
  int stages;
  int cluster;        // blocks, one below the other, that bring half of their b each, for all
  int k_tile_clocks;  // what binds 64 of K
  int linear_clocks;  // by which an epilogue without activation delays the next tile
  int group;          // M tiles side by side: a wave's panels of a and b are equally large
  const char* reason;
};

constexpr int kGemmBlockK = 64;
constexpr int kGatedClocks = 2900;

constexpr GemmTuning kGemmTunings[] = {
    {GemmSchedule::kCooperative256, 256, false, 4, 2, 1024, 760, 16,
     "192 KB of stages, 32 of slabs; shared memory no longer binds"},
    {GemmSchedule::kPingPong192, 192, true, 4, 2, 832, 0, 14,
     "160 KB of stages, 64 of slabs; 92 % of the tensor cores' peak, no epilogue to be seen"},
    {GemmSchedule::kPingPong128, 128, true, 5, 1, 640, 0, 11,
     "160 KB of stages, 64 of slabs; 80 %, but where tiles are few more of them are filled"},
    {GemmSchedule::kPingPong192Loads, 192, true, 3, 1, 832, 0, 14,
     "120 KB of stages, 96 of slabs: a tile comes into them while the one before is multiplied"},
};

// Which schedules are compiled for what. A bias alone is so little that both consumers may add it
// at once; what goes to a total and back, and a source that TMA brings, is hidden in ping-pong.
constexpr bool gemm_compiled(GemmSchedule schedule, GemmWork work) {
  const bool wide = schedule == GemmSchedule::kCooperative256;
  const bool hidden = schedule == GemmSchedule::kPingPong192;
  const bool few = schedule == GemmSchedule::kPingPong128;
  switch (work) {
    case GemmWork::kLinear: return wide || few;
    case GemmWork::kActivation: return hidden || few;
    case GemmWork::kGradient: return hidden;
    case GemmWork::kResidual: return hidden;
    case GemmWork::kGated: return wide;
    default: return schedule == GemmSchedule::kPingPong192Loads;
  }
}

// By which the epilogue of a tile delays the next one, if it is not hidden.
constexpr int gemm_epilogue_clocks(const GemmTuning& tuning, GemmWork work) {
  return work == GemmWork::kGated ? kGatedClocks : tuning.linear_clocks;
}

// Tiles, and those that no row of the matrix is in but a cluster needs.
constexpr int64_t gemm_tiles(const GemmTuning& tuning, int M, int N) {
  const int64_t rows = int64_t{kGemmBlockM} * tuning.cluster;
  return (M + rows - 1) / rows * tuning.cluster *
         ((int64_t{N} + tuning.block_n - 1) / tuning.block_n);
}

// How many run at once.
constexpr int gemm_blocks(const GemmTuning& tuning, int sms) {
  const int blocks = sms / tuning.cluster * tuning.cluster;
  return blocks > 0 ? blocks : tuning.cluster;
}

// Clocks of the multiprocessor that has most tiles.
constexpr int64_t gemm_clocks(const GemmTuning& tuning, int M, int N, int K, GemmWork work,
                              int sms) {
  const int64_t blocks = gemm_blocks(tuning, sms);
  const int64_t k_tiles = (int64_t{K} + kGemmBlockK - 1) / kGemmBlockK;
  return (gemm_tiles(tuning, M, N) + blocks - 1) / blocks *
         (k_tiles * tuning.k_tile_clocks + gemm_epilogue_clocks(tuning, work));
}

// The schedule that is done first, the widest of equals.
constexpr GemmTuning gemm_tuning_sm90(int M, int N, int K, GemmWork work, int sms) {
  GemmTuning best{};
  int64_t least = INT64_MAX;
  for (const GemmTuning& tuning : kGemmTunings) {
    const int64_t clocks = gemm_clocks(tuning, M, N, K, work, sms);
    if (!gemm_compiled(tuning.schedule, work) || clocks >= least) continue;
    best = tuning;
    least = clocks;
  }
  return best;
}

// How tiles are dealt out: the first `whole` to a block each, the others, of 128 x 256, in equal
// shares to `blocks` of them (gemm_parts_sm90.h).
struct GemmPlan {
  GemmTuning tuning;  // of the whole tiles
  int64_t whole;
  int blocks;     // 0: all tiles are whole
  int64_t steps;  // of 64 of K that are shared
  int64_t slots;  // for the sums of parts, a tile each
};

constexpr int kPartColumns = 256;
constexpr double kJoinClocks = 4000;       // 2 us: of one more launch, and of its blocks' ends
constexpr double kPartClocks = 600;        // in which a block stores the sums of a part
constexpr double kSlotBytesPerClock = 20;  // of the GPU's memory, per multiprocessor
constexpr int64_t kMostSlots = 4096;       // 512 MB

// If all tiles behind `whole` are shared. They are numbered as clusters have them, which may leave
// out none.
constexpr GemmPlan gemm_shared_plan(int M, int N, int K, int sms, bool keeps_whole) {
  GemmPlan plan{kGemmTunings[0], 0, 0, 0, 0};
  const int64_t rows = (int64_t{M} + kGemmBlockM - 1) / kGemmBlockM;
  const int64_t tiles = rows * ((int64_t{N} + kPartColumns - 1) / kPartColumns);
  const int64_t blocks = gemm_blocks(plan.tuning, sms);
  if (keeps_whole && rows % plan.tuning.cluster != 0) return plan;
  plan.whole = keeps_whole ? tiles / blocks * blocks : 0;
  plan.steps = (tiles - plan.whole) * ((int64_t{K} + kGemmBlockK - 1) / kGemmBlockK);
  plan.blocks = static_cast<int>(plan.steps < sms ? plan.steps : sms);
  plan.slots = tiles - plan.whole + plan.blocks - 1;
  return plan;
}

constexpr int64_t gemm_shared_clocks(const GemmPlan& plan, int M, int N, int K, GemmWork work,
                                     int sms) {
  const int64_t k_tiles = (int64_t{K} + kGemmBlockK - 1) / kGemmBlockK;
  const int64_t shared = plan.steps / k_tiles;
  const int64_t whole =
      plan.whole / sms *
      (k_tiles * plan.tuning.k_tile_clocks + gemm_epilogue_clocks(plan.tuning, work));
  const int64_t products = (plan.steps + plan.blocks - 1) / plan.blocks * plan.tuning.k_tile_clocks;
  const double parts = kPartClocks * static_cast<double>((shared - 1) / plan.blocks + 2);
  const int64_t sums =
      int64_t{M < kGemmBlockM ? M : kGemmBlockM} * (N < kPartColumns ? N : kPartColumns);
  const double moved = 2.0 * 4.0 * static_cast<double>(plan.slots * sums);
  return whole + products +
         static_cast<int64_t>(kJoinClocks + parts + moved / (kSlotBytesPerClock * sms));
}

// The schedule that is done first, with all tiles whole, with all of them shared, or where whole
// tiles are 128 x 256 too, with those of the last wave.
constexpr GemmPlan gemm_plan_sm90(int M, int layer_N, int K, GemmWork work, int sms) {
  const int N = gemm_columns(layer_N, work);
  const GemmTuning tuning = gemm_tuning_sm90(M, N, K, work, sms);
  GemmPlan best{tuning, gemm_tiles(tuning, M, N), 0, 0, 0};
  int64_t least = gemm_clocks(tuning, M, N, K, work, sms);
  for (const bool keeps_whole : {false, true}) {
    if (keeps_whole && !gemm_compiled(GemmSchedule::kCooperative256, work)) break;
    const GemmPlan plan = gemm_shared_plan(M, N, K, sms, keeps_whole);
    if (plan.steps == 0 || plan.steps >= INT32_MAX || plan.slots > kMostSlots) continue;
    const int64_t clocks = gemm_shared_clocks(plan, M, N, K, work, sms);
    if (clocks < least) best = plan, least = clocks;
  }
  return best;
}

// Room for the sums of parts.
constexpr int64_t gemm_part_floats(const GemmParams& p) {
  return gemm_plan_sm90(p.M, p.N, p.K, gemm_work(p.layer), p.sms).slots * kGemmBlockM *
         kPartColumns;
}

constexpr GemmTuning gemm_tuning_of(GemmSchedule schedule) {
  return kGemmTunings[static_cast<int>(schedule)];
}

}  // namespace fused_lm
