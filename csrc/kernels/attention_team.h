// Two warps that own the same rows.
//
// A warp with R rows reads each value of the other axis once for all of them, and R is what its
// registers hold sums for: 16 rows at wide heads, where shared memory binds. Two warps, a team, own
// 32 rows together. Of the scores each makes those with its own half of the other axis; of the
// sums each holds its own half of the columns. The second product wants all scores of the rows:
// each warp hands its own to the other one through shared memory, rounded, as the very registers
// of the left operand, so that neither side needs ldmatrix or meets a bank conflict.
//
// Columns are dealt out by 16, in turn: then what depends on the warp stays within the period in
// which a tile's chunks are reordered.
#pragma once

#include "kernels/attention_products.h"
#include "ptx/barrier.h"

namespace fused_lm {

// Which rows a warp owns, and which of its team's warps it is.
struct TeamPlace {
  int row;   // its first one in the block
  int part;  // 0 without a team
};

template <class C>
__device__ __forceinline__ int part_of_team() {
  return static_cast<int>(threadIdx.x / kWarpSize % C::kTeam);
}

template <class C>
__device__ __forceinline__ TeamPlace team_place(unsigned thread) {
  const auto team = static_cast<int>(thread / (kWarpSize * C::kTeam));
  return {team * C::kTuning.rows_per_warp, static_cast<int>(thread / kWarpSize % C::kTeam)};
}

// The named barrier of a team, where its warps wait for each other. Barrier 0 is the block's.
template <class C>
__device__ __forceinline__ int team_barrier(const TeamPlace& place) {
  return 1 + place.row / C::kTuning.rows_per_warp;
}

template <class C>
constexpr int kTeamThreads = C::kTeam * kWarpSize;

// A warp's scores as left operands of the next product, [rows, own part of the other axis].
template <class C>
using Operands = uint32_t[C::kScores / 2][C::kM][4];

// Where a block's warps leave theirs for each other.
template <class C>
struct Handover {
  static_assert(C::kTeam == 2 && C::kScores % 2 == 0, "one other warp, and whole operands");
  uint4 operands[C::kThreads / kWarpSize][C::kScores / 2][C::kM][kWarpSize];
};

template <class Element, class C>
__device__ __forceinline__ void hand_over(Operands<C>& packed, const Scores<C>& value,
                                          Handover<C>& sHandover) {
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
#pragma unroll
  for (int step = 0; step < C::kScores / 2; ++step) {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
      uint32_t (&a)[4] = packed[step][m];
      pack_a<Element>(a, value[m][2 * step], value[m][2 * step + 1]);
      // One store: a list of four is four stores to g++, and to the harness.
      const uint4 whole = {a[0], a[1], a[2], a[3]};
      *reinterpret_cast<uint4*>(&sHandover.operands[warp][step][m][own_lane()]) = whole;
    }
  }
}

// The other warp's, once it has come to the team's barrier.
template <class C>
__device__ __forceinline__ void take_over(Operands<C>& packed, const Handover<C>& sHandover) {
  const int other = static_cast<int>(threadIdx.x / kWarpSize) ^ 1;
#pragma unroll
  for (int step = 0; step < C::kScores / 2; ++step) {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
      const uint4 a = sHandover.operands[other][step][m][own_lane()];
      packed[step][m][0] = a.x, packed[step][m][1] = a.y;
      packed[step][m][2] = a.z, packed[step][m][3] = a.w;
    }
  }
}

// sum += a b: of b the rows that `rows` says whose part it is, and the warp's own columns.
template <class Element, class C, class Tile>
__device__ __forceinline__ void add_part(Sums<C>& sum, const Operands<C>& a, Tile& sB, int lane,
                                         int rows, int part) {
  static_assert(Tile::kColumns == C::kTeam * C::kSums * kMmaColumns);
  const int first = rows * C::kScores * kMmaColumns;
#pragma unroll
  for (int step = 0; step < C::kScores / 2; ++step) {
#pragma unroll
    for (int pair = 0; pair < C::kSums / 2; ++pair) {
      const OperandPair b = load_b(sB, lane, first, step * kMmaDepth, part, C::kTeam * pair);
      multiply_pair<Element>(sum, a[step], b, pair);
    }
  }
}

// store_sums of rows that may be a team's: its warps have half of the columns each, and store half
// of the rows. `first` is the row of gHead that the block's first one goes to. What lay in sRows
// has been read by both warps before a barrier that both have passed.
template <class Element, class C, class Tile, class Factor>
__device__ __forceinline__ void store_own(uint16_t* gHead, int64_t stride, int first, int length,
                                          int columns, const Sums<C>& sum, const Factor& factor,
                                          Tile& sRows, const TeamPlace& place) {
  if constexpr (C::kTeam == 1) {
    store_sums<Element>(gHead, stride, first + place.row, length, columns, sum, factor, sRows,
                        place.row);
  } else {
    constexpr int kRows = C::kTuning.rows_per_warp / C::kTeam;
    const int row = place.row + place.part * kRows;
    stage_sums<kDTypeOf<Element>, C::kTeam>(sum, factor, sRows, place.row, place.part);
    ptx::named_barrier_sync(team_barrier<C>(place), kTeamThreads<C>);
    store_tile_rows<kRows>(gHead, stride, first + row, length, columns, sRows, row);
  }
}

}  // namespace fused_lm
