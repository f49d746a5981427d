// Tiles of the attention kernels: pure functions of the head dim, a reason per row.
//
// The plain rows, the general ones of 64 and 128, and the teams that an H200 runs were chosen on it
// among 250 variants, bf16, 4096 queries and keys: raw times in benchmarks/results, what they
// decided in benchmarks/LOG.md. The others, an A100's blocks of teams among them, come from the
// arithmetic below and from ptxas: no spill on any architecture.
//
// The arithmetic of the forward, per multiprocessor and clock of an A100: 2048 FLOP of the tensor
// cores, 128 bytes of shared memory, 16 exponentials, 64 fp32 operations. A warp with R rows reads
// k and v once for them: 4 R S D FLOP, 4 S D bytes, so R FLOP per byte. R = 16 needs all 128 bytes
// per clock, R = 32 half of them: 32 rows per warp wherever the registers hold their sums, which
// are D fp32 per thread, beside scores, which are keys per tile. On the H200 that is worth more
// than twice the warps.
//
// Two warps per scheduler don't hide what stands between two products: keys per tile are as many as
// the registers hold, because barrier, maxima and branches come once per tile.
#pragma once

#include "common/types.h"

namespace fused_lm {

// Where a warp has its rows of q while it walks over the keys.
enum class QueryPlace : int {
  kShared,     // read again for every tile
  kRegisters,  // read once: D / 2 registers at 32 rows, D / 4 at 16
  kStaged,     // read once, from where the first keys come afterwards
};

struct AttentionTuning {
  int rows_per_warp;  // 16 or 32
  int warps;
  int block_s;        // keys per tile; two tiles of k and of v are in shared memory, a team's one
  int blocks_per_sm;  // that registers have to leave room for
  QueryPlace queries;
  const char* reason;
  int team = 1;  // warps that own the same rows: attention_team.h

  constexpr int threads() const { return warps * kWarpSize; }
  constexpr int block_t() const { return warps / team * rows_per_warp; }
};

// Head dims that kernels are compiled for; others run in the next larger one, zeros beside them.
constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

// Without mask, key mask, bias, softcap and dropout.
constexpr AttentionTuning attention_forward_plain_tuning(int head_dim) {
  if (head_dim <= 32) return {32, 4, 128, 2, QueryPlace::kRegisters, "40 KB, q in 16 registers"};
  if (head_dim <= 64) return {32, 4, 64, 2, QueryPlace::kRegisters, "48 KB, q in 32 registers"};
  if (head_dim <= 96) return {32, 4, 64, 2, QueryPlace::kShared, "72 KB; q in registers spills"};
  if (head_dim <= 128) return {32, 4, 48, 2, QueryPlace::kShared, "80 KB; 64 keys spill"};
  if (head_dim <= 192) return {16, 8, 64, 1, QueryPlace::kStaged, "96 KB, q in 48 registers"};
  return {16, 8, 32, 1, QueryPlace::kStaged, "64 KB, q in 64 registers"};
}

// With any of them: every feature is behind a branch, so the band is too. Their arithmetic takes
// registers from q; what they load is waited for once per tile, so tiles are long.
constexpr AttentionTuning attention_forward_general_tuning(int head_dim) {
  if (head_dim <= 32) {
    return {32, 4, 32, 2, QueryPlace::kRegisters, "16 KB, q in 16 registers"};
  }
  if (head_dim <= 64) return {16, 4, 48, 3, QueryPlace::kShared, "32 KB; 64 keys spill"};
  if (head_dim <= 96) {
    return {16, 8, 64, 1, QueryPlace::kShared, "72 KB; the sums of 32 rows leave too little"};
  }
  if (head_dim <= 128) return {16, 4, 64, 2, QueryPlace::kShared, "80 KB; the same"};
  if (head_dim <= 192) return {16, 8, 32, 1, QueryPlace::kStaged, "48 KB, q in 48 registers"};
  return {16, 4, 32, 1, QueryPlace::kShared, "96 KB, q beside k and v"};
}

// The backward: rows of the axis that a warp owns, keys for dk and dv or queries for dq, and how
// many of the other axis come at once, twice in shared memory (once in attention_bwd_teams). With R
// rows and N of the other axis a warp multiplies 8 R N D (6 for dq) and reads 2 D (2 R + 4 N) bytes
// (3 N for dq): its own operands again for every tile. On an A100, in % of the tensor cores' time:
// 75 at R = N = 32, 125 at 16 and 32, 113 at 16 and 64 (dq: 83, 133), so shared memory binds where
// the sums leave no room for 32 rows, and more of the other axis helps a little.
struct AttentionBackwardTuning {
  int rows_per_warp;
  int warps;
  int block_other;
  int blocks_per_sm;
  const char* reason;
  int team = 1;  // warps that own the same rows: attention_team.h

  constexpr int threads() const { return warps * kWarpSize; }
  constexpr int block_own() const { return warps / team * rows_per_warp; }
};

// Above 128 columns dk and dv are two launches: their sums together are 2 D registers at 32 rows.
constexpr int kMaxJointHeadDim = 128;

constexpr AttentionBackwardTuning attention_dkdv_tuning(int head_dim, bool general) {
  if (head_dim <= 32) {
    if (general) return {16, 4, 32, 3, "17 KB; 32 keys leave features too little"};
    return {32, 4, 64, 2, "33 KB; sums 64 registers, scores and dp 128"};
  }
  if (head_dim <= 64) {
    if (general) return {16, 4, 32, 3, "33 KB; 32 keys leave features too little"};
    return {32, 4, 32, 2, "49 KB; sums 128 registers, scores and dp 64"};
  }
  if (head_dim <= 96) {
    if (general) return {16, 4, 32, 2, "49 KB; sums 96 registers, scores and dp 32"};
    return {16, 4, 64, 2, "73 KB; sums 96 registers, scores and dp 64"};
  }
  if (head_dim <= 128) {
    if (general) return {16, 8, 32, 1, "97 KB; sums 128 registers, scores and dp 32"};
    return {16, 4, 64, 2, "97 KB; sums 128 registers, scores and dp 64"};
  }
  if (head_dim <= 192) return {16, 4, 32, 1, "97 KB; sums 96 registers"};
  return {16, 4, 16, 1, "97 KB; sums 128 registers"};
}

constexpr AttentionBackwardTuning attention_dq_tuning(int head_dim, bool general) {
  if (head_dim <= 32) {
    if (general) return {32, 4, 32, 2, "25 KB; sums 32 registers"};
    return {32, 4, 64, 2, "33 KB; sums 32 registers, scores and dp 128"};
  }
  if (head_dim <= 64) {
    if (general) return {32, 4, 32, 2, "49 KB; sums 64 registers, scores and dp 64"};
    return {32, 4, 64, 2, "65 KB; sums 64 registers, scores and dp 128"};
  }
  if (head_dim <= 96) {
    if (general) return {16, 8, 64, 1, "97 KB; sums 48 registers, scores and dp 64"};
    return {32, 4, 32, 2, "73 KB; sums 96 registers, scores and dp 64"};
  }
  if (head_dim <= 128) {
    if (general) return {16, 4, 64, 2, "97 KB; sums 64 registers"};
    return {32, 4, 32, 2, "97 KB; sums 128 registers, scores and dp 64"};
  }
  if (head_dim <= 192) return {16, 4, 32, 1, "97 KB; sums 96 registers"};
  return {16, 4, 16, 1, "97 KB; sums 128 registers"};
}

// Teams (attention_team.h): two warps own 32 rows together where the sums, or in general kernels
// the features, leave one no room for them. For each tile of N a team reads its own a left operands
// twice, and a + b tiles of the other axis once (of scores and dP, and of the b sums that they go
// into); scores are handed over. So 2 (a + b) R N D FLOP, and 2 D (2 a R + (a + b) N) + 4 b R N
// bytes; the copies of two tiles for all teams of a block come on top. In % of the time of an
// A100's tensor cores at N = 64, by teams per block, beside the kernel of 16 rows per warp:
//
//   head dim                   96              128             192             256
//   teams per block         4   2   16      4   2   16      4   2   16      4   2   16
//   forward               104 117  125    100 112  138     96 108  112     94 106  112   a = b = 1
//   forward, N = 96        96 108          92 104          88 100                        a = b = 1
//   dk and dv              98 104  125     94 100  125                                   a = b = 2
//   dv                                                     96 108  150     94 106  175   a = b = 1
//   dk, dq                                                 97 106  150     96 104  183   a = 2,
//   dq, N = 96             92 100  125     89  97  133                                     b = 1
//
// The forward of 16 rows is the plain one; with features it reads q again for every tile: 150 at
// 256.
//
// So says the arithmetic. On an H200, whose mma.sync asks for more of its shared memory than an
// A100's, two blocks of two teams were mostly faster than one of four all the same, by 1 to 10 %,
// with features by more: while one block waits at a barrier or for a bias, the other one works. So
// what fits twice comes first, then four teams, then two alone. The plain forward, which waits for
// less, has four: 6 % faster so at 192 columns, 2 % at 256.
//
// Kernels of 16 rows per warp run where a block cannot have 163 KB: on sm_86, 89 and 120, whose
// tensor cores take two to four times as long, so that shared memory does not bind there.
constexpr int kSharedBytesOfA100 = 163 * 1024;  // that a block may have
constexpr int kSharedBytesOfH100 = 227 * 1024;
constexpr int kSharedBytesPerBlock = 1024;  // that each takes for itself, of 1 KB more in all

// How many warps are on a multiprocessor at once.
template <class Tuning>
constexpr int resident_warps(const Tuning& tuning, size_t block_bytes, size_t shared_bytes) {
  const size_t fit = (shared_bytes + kSharedBytesPerBlock) / (block_bytes + kSharedBytesPerBlock);
  return tuning.warps * (fit < static_cast<size_t>(tuning.blocks_per_sm) ? static_cast<int>(fit)
                                                                         : tuning.blocks_per_sm);
}

// Whether there are blocks of 4 or 8 warps.
constexpr bool has_forward_teams(int head_dim, bool general, int warps) {
  if (head_dim <= 128) return general && head_dim > 64 && warps == 4;
  return general || warps == 8;
}

constexpr AttentionTuning attention_forward_teams_tuning(int head_dim, bool general, int warps) {
  constexpr auto kPlace = QueryPlace::kShared;
  if (head_dim <= 96) return {32, 4, 64, 3, kPlace, "44 KB; sums 48 registers of 168", 2};
  if (head_dim <= 128) return {32, 4, 96, 2, kPlace, "77 KB; sums 64 registers, scores 48", 2};
  const int blocks = warps == 4 ? 2 : 1;
  if (head_dim <= 192) {
    return {32, warps, 96, blocks, kPlace, "109 or 145 KB; sums 96 registers, scores 48", 2};
  }
  return {32, warps, 64, blocks, kPlace, "105 or 145 KB; sums 128 registers, scores 32", 2};
}

// Passes of the backward in teams; kBoth is dk and dv in one launch.
enum class TeamPass : int { kKeys, kValues, kQueries, kBoth };

// Whether there are blocks of 4 or 8 warps.
constexpr bool has_backward_teams(int head_dim, TeamPass pass, bool general, int warps) {
  if (pass == TeamPass::kBoth) return head_dim == 96 || head_dim == 128;
  if (head_dim <= 128) return pass == TeamPass::kQueries && general && head_dim > 64 && warps == 4;
  return true;
}

constexpr AttentionBackwardTuning attention_backward_teams_tuning(int head_dim, TeamPass pass,
                                                                  int warps) {
  const bool few = warps == 4;
  if (pass == TeamPass::kBoth) {
    constexpr auto kWhy96 = "sums 96 registers, scores and dp 64; 89 or 129 KB";
    constexpr auto kWhy128 = "sums 128 registers, scores and dp 64; 113 or 161 KB";
    return {32, warps, 64, few ? 2 : 1, head_dim <= 96 ? kWhy96 : kWhy128, 2};
  }
  if (head_dim <= 128) {
    return {32, warps, 96, 2, "sums 48 or 64 registers, scores and dp 96; 73 or 93 KB", 2};
  }
  if (pass == TeamPass::kValues) {
    constexpr auto kWhy192 = "sums 96 registers, scores 32; 81 KB";
    constexpr auto kWhy256 = "sums 128 registers, scores 32; 105 or 145 KB";
    return {32, warps, 64, few ? 2 : 1, head_dim <= 192 ? kWhy192 : kWhy256, 2};
  }
  if (head_dim <= 192) {
    return {32, warps, 64, few ? 2 : 1, "sums 96 registers, scores and dp 64; 105 or 161 KB", 2};
  }
  return {32, warps, 64, 1, "sums 128 registers, scores and dp 64; 137 or 209 KB", 2};
}

// Passes that work on one [block_t, block_s] tile of [T, S] at a time, and walk over the columns of
// its operands in slices: no head dim is compiled in.
//
// Per slice of 64 columns a block reads (block_t + block_s) 128 bytes for 128 block_t block_s FLOP:
// 32 FLOP per byte of the L2 at [64, 64]. Two slices are 32 KB.
enum class SlicedPass : int { kWeights, kDbias };

constexpr int kSliceColumns = 64;  // whole banks

struct SlicedTuning {
  int rows_per_warp;
  int warps;
  int block_s;
  int blocks_per_sm;
  const char* reason;

  constexpr int threads() const { return warps * kWarpSize; }
  constexpr int block_t() const { return warps * rows_per_warp; }
};

constexpr SlicedTuning sliced_tuning(SlicedPass pass) {
  if (pass == SlicedPass::kWeights) {
    constexpr auto kWhy =
        "scores and their sum over heads are 64 of 168 registers; in 128 they spill";
    return {16, 4, 64, 3, kWhy};
  }
  constexpr auto kWhy = "scores, dP and the sum are 96 of 168 registers; 12 warps in three blocks";
  return {16, 4, 64, 3, kWhy};
}

}  // namespace fused_lm
