// Backward of softmax attention, the pass over keys: dk and dv for every GPU since Ampere.
//
//   P = exp(score - lse)                     dv = dropout(P)^T dout
//   dP = dropout(dout v^T)                   ds = P (dP - delta) (1 - tanh^2)
//   dk = scale ds^T q
//
// dq has a pass of its own (attention_bwd_dq_sm80.h): 7 products instead of 5, and every
// exponential twice. One pass would add to dq once per key tile: T D sums of 4 bytes, as many bytes
// as the q and dout that the tile reads, into an fp32 buffer that is zeroed before and rounded
// after. By atomics every run gives another result; in a fixed order blocks wait for each other.
// The second pass reads k and v, 4 S D bytes, once per query tile instead: where both tiles are
// equally long, what the sums would have been. So it costs 4 T S D FLOP beside 10, and T S
// exponentials; it repeats bitwise, and needs no memory beside two numbers per row.
//
// Grid: one block per (key tile, key-value head, batch), which walks over the query tiles of all
// heads of its group: no block adds to another one's sums. A warp owns 32 or 16 keys, a team 32.
//
// Products are transposed, [keys, queries]: scores k q^T and dP v dout^T come out of the tensor
// cores in the layout in which P^T and ds^T go in again as left operands, so neither passes through
// shared memory. lse and delta belong to columns then: a thread reads those of its two queries.
//
// Shared memory: k and v [block_s, D], which stay; q, dout [2, block_t, D], lse and delta
// [2, block_t]: while a tile is worked on the next one is on its way into the other half, with one
// barrier per tile, as in the forward. Rows behind the last query are zeros, and add nothing.
//
// Parts: up to 128 columns one launch makes dk and dv; above, one makes dv and one dk, since
// registers hold the sums of one only. Plain and general kernels as in the forward; above 128
// columns general ones alone, for GPUs on which attention_bwd_teams_sm80.h does not fit.
//
// Teams (attention_team.h): the kernels of 96 and 128 columns exist a second time, with two warps
// on the same 32 keys. P^T and ds^T then do pass through shared memory, from one warp to the
// other; q and dout are read half as often.
//
// Bytes: reads k and v once, and per key tile the D + Dv columns of the queries that see it, in
// every head of the group; writes dk and dv once. FLOPs: 8 block_t block_s kD per pair of tiles. In
// two parts q, dout and k are read twice, and it is 10.
//
// Source: Dao 2023 (arXiv:2307.08691) alg. 2.
#pragma once

#include <type_traits>

#include "kernels/attention_dropout.h"
#include "kernels/attention_gradients.h"
#include "kernels/attention_products.h"
#include "kernels/attention_score.h"
#include "kernels/attention_team.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_dkdv {

enum class Part { kBoth, kValues, kKeys };

// kTeamWarps: of a block of teams; 0: no teams.
template <int kHeadDim, bool kIsGeneral, Part kWanted, int kTeamWarps>
struct Config {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kIsGeneral;
  static constexpr Part kPart = kWanted;
  static constexpr AttentionBackwardTuning kTuning =
      kTeamWarps == 0 ? attention_dkdv_tuning(kD, kGeneral)
                      : attention_backward_teams_tuning(kD, TeamPass::kBoth, kTeamWarps);
  static constexpr int kTeam = kTuning.team;
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockS = kTuning.block_own();
  static constexpr int kBlockT = kTuning.block_other;
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kScores = kBlockT / kTeam / kMmaColumns;
  static constexpr int kSums = kD / kTeam / kMmaColumns;
  static constexpr bool kValues = kPart != Part::kKeys;
  static constexpr bool kKeys = kPart != Part::kValues;

  struct Queries {
    SharedTile<kBlockT, kD> q;
    SharedTile<kBlockT, kD> dout;
    ColumnNumbers<kBlockT> numbers;
  };
  struct Single {
    SharedTile<kBlockS, kD> k;  // at the end: dk; a team reads and writes its own rows only
    SharedTile<kBlockS, kD> v;  // at the end: dv
    Queries queries[2];
  };
  struct Paired : Single {
    Handover<Config> probs;
    Handover<Config> gradients;
  };
  using SharedStorage = std::conditional_t<kTeam == 1, Single, Paired>;
};

// Starts the copies of one query tile of one head; rows behind the last are zeros.
template <class C>
__device__ __forceinline__ void copy_queries(typename C::Queries& queries,
                                             const AttentionBackwardParams& p, int batch, int head,
                                             int t_first) {
  const AttentionShape& shape = p.shape;
  copy_rows_async<C::kThreads>(queries.q, p.q + head_offset(p.q_strides, batch, head),
                               p.q_strides.row, t_first, shape.T, shape.D);
  copy_rows_async<C::kThreads>(queries.dout, p.dout + head_offset(p.dout_strides, batch, head),
                               p.dout_strides.row, t_first, shape.T, shape.Dv);
  copy_numbers<C::kThreads>(queries.numbers, p, batch, head, t_first);
  ptx::cp_async_commit();
}

// One query tile: adds to the sums. edge: the band may end in it. The lane is read anew where what
// is kept from above would cost spills.
template <class Element, class C>
__device__ __forceinline__ void add_tile(Sums<C>& dk, Sums<C>& dv, typename C::SharedStorage& smem,
                                         typename C::Queries& queries,
                                         const AttentionBackwardParams& p,
                                         const ScoreTile<true>& tile, int row, bool edge) {
  const int lane = own_lane();
  Scores<C> score;
  [[maybe_unused]] Scores<C> slope;
  [[maybe_unused]] uint32_t keep[C::kM];
  multiply_transposed<Element>(score, shared_operands(smem.k, lane, row), queries.q, lane);
  if constexpr (C::kGeneral) {
    finish_scores(score, slope, tile, p.score, edge);
  } else if (edge) {
    hide_outside_band(score, tile, p.score.lower, p.score.upper);
  }
  probabilities<C>(score, queries.numbers.row_lse, p.score.scale);
  const bool drops = C::kGeneral && p.dropout.rng != nullptr;
  if constexpr (C::kGeneral) {
    if (drops) {
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      keep_mask<C::kM, C::kScores>(keep, tile, key, p.dropout.threshold);
    }
  }
  if constexpr (C::kValues) {
    if constexpr (C::kGeneral) {
      Scores<C> kept;
      for_each_value<C::kM, C::kScores>(
          [&](int m, int n, int e) { kept[m][n][e] = score[m][n][e]; });
      if (drops) drop(kept, keep);
      add_product<Element>(dv, kept, queries.dout, lane);
    } else {
      add_product<Element>(dv, score, queries.dout, lane);
    }
  }
  if constexpr (C::kKeys) {
    Scores<C> dp;
    multiply_transposed<Element>(dp, shared_operands(smem.v, ptx::lane_index(), row), queries.dout,
                                 lane);
    float factor = 1.0f;
    if constexpr (C::kGeneral) {
      if (drops) {
        drop(dp, keep);
        factor = p.dropout.scale;
      }
    }
    score_gradients<C>(dp, score, queries.numbers.delta, factor);
    if constexpr (C::kGeneral) {
      if (p.score.softcap > 0.0f) {
        for_each_value<C::kM, C::kScores>(
            [&](int m, int n, int e) { dp[m][n][e] *= slope[m][n][e]; });
      }
    }
    add_product<Element>(dk, dp, queries.q, lane);
  }
}

// The same for a team, with both results. dP comes before the scores: then the cap's derivative
// meets it where it is made, and is not held.
template <class Element, class C>
__device__ __forceinline__ void add_tile_in_team(Sums<C>& dk, Sums<C>& dv,
                                                 typename C::SharedStorage& smem,
                                                 typename C::Queries& queries,
                                                 const AttentionBackwardParams& p,
                                                 const ScoreTile<true>& tile,
                                                 const TeamPlace& place, bool edge) {
  static_assert(C::kPart == Part::kBoth);
  const int lane = ptx::lane_index();
  const int column = place.part * (C::kBlockT / C::kTeam);
  const bool drops = C::kGeneral && p.dropout.rng != nullptr;
  [[maybe_unused]] uint32_t keep[C::kM];
  Scores<C> score, dp;
  multiply_transposed<Element>(dp, shared_operands(smem.v, lane, place.row), queries.dout, lane,
                               column);
  if constexpr (C::kGeneral) {
    if (drops) {
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      keep_mask<C::kM, C::kScores>(keep, tile, key, p.dropout.threshold);
      drop(dp, keep);
    }
  }
  subtract_delta<C>(dp, queries.numbers.delta + column, drops ? p.dropout.scale : 1.0f);
  multiply_transposed<Element>(score, shared_operands(smem.k, lane, place.row), queries.q, lane,
                               column);
  if constexpr (C::kGeneral) {
    finish_scores(score, tile, p.score, edge,
                  [&](int m, int n, int e, float tanh) { dp[m][n][e] *= fmaf(-tanh, tanh, 1.0f); });
  } else if (edge) {
    hide_outside_band(score, tile, p.score.lower, p.score.upper);
  }
  probabilities<C>(score, queries.numbers.row_lse + column, p.score.scale);
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) { dp[m][n][e] *= score[m][n][e]; });
  if constexpr (C::kGeneral) {
    if (drops) drop(score, keep);
  }
  Operands<C> operands;
  hand_over<Element, C>(operands, score, smem.probs);
  add_part<Element, C>(dv, operands, queries.dout, lane, place.part, place.part);
  hand_over<Element, C>(operands, dp, smem.gradients);
  add_part<Element, C>(dk, operands, queries.q, lane, place.part, place.part);
  ptx::named_barrier_sync(team_barrier<C>(place), kTeamThreads<C>);
  take_over<C>(operands, smem.probs);
  add_part<Element, C>(dv, operands, queries.dout, lane, place.part ^ 1, place.part);
  take_over<C>(operands, smem.gradients);
  add_part<Element, C>(dk, operands, queries.q, lane, place.part ^ 1, place.part);
}

template <class Element, int kHeadDim, bool kGeneral, Part kPart, int kTeamWarps>
__global__ void __launch_bounds__(
    (Config<kHeadDim, kGeneral, kPart, kTeamWarps>::kThreads),
    (Config<kHeadDim, kGeneral, kPart, kTeamWarps>::kTuning.blocks_per_sm))
    attention_bwd_dkdv_sm80(AttentionBackwardParams p, int batch_first) {
  using C = Config<kHeadDim, kGeneral, kPart, kTeamWarps>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionShape& shape = p.shape;
  const BlockTile block = block_tile(false, batch_first);
  const int s_first = block.tile * C::kBlockS;
  const int s_last = min(s_first + C::kBlockS, shape.S) - 1;
  // From a key's side query t is visible where s - upper <= t <= s - lower.
  const BandTiles band =
      band_tiles<C::kBlockT>(s_first, s_last, shape.T, -p.score.upper, -p.score.lower);
  const int first_head = block.head * shape.group;
  const int end_head = first_head + shape.group;
  const auto copy = [&](int half, int head, int i) {
    copy_queries<C>(smem.queries[half], p, block.batch, head, band.start<C::kBlockT>(i));
  };
  if (band.count > 0) {
    copy_rows_async<C::kThreads>(smem.k, p.k + head_offset(p.k_strides, block.batch, block.head),
                                 p.k_strides.row, s_first, shape.S, shape.D);
    if constexpr (C::kKeys) {
      copy_rows_async<C::kThreads>(smem.v, p.v + head_offset(p.v_strides, block.batch, block.head),
                                   p.v_strides.row, s_first, shape.S, shape.Dv);
    }
    copy(0, first_head, 0);
  }

  const FragmentLane at = fragment_lane(own_lane());
  const int row = static_cast<int>(threadIdx.x / (kWarpSize * C::kTeam)) * C::kTuning.rows_per_warp;
  const TeamPlace place{row, part_of_team<C>()};
  ScoreTile<true> tile{0, s_first + row + at.row, shape.T, shape.S, block.batch, 0};
  Sums<C> dk, dv;
  if constexpr (C::kKeys) fill_zero(dk);
  if constexpr (C::kValues) fill_zero(dv);
  int half = 0;
  for (int head = first_head; head < end_head; ++head) {
    for (int i = 0; i < band.count; ++i) {
      const int start = band.start<C::kBlockT>(i);
      const bool edge = band.edge(start);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (i + 1 < band.count) {
        copy(half ^ 1, head, i + 1);
      } else if (head + 1 < end_head) {
        copy(half ^ 1, head + 1, 0);
      }
      tile.head = head;
      tile.t_first = start + at.column;
      if constexpr (C::kTeam == 1) {
        add_tile<Element, C>(dk, dv, smem, smem.queries[half], p, tile, row, edge);
      } else {
        const FragmentLane now = fragment_lane(ptx::lane_index());  // kept, it costs spills
        tile.t_first = start + now.column + place.part * (C::kBlockT / C::kTeam);
        tile.s_first = s_first + row + now.row;
        add_tile_in_team<Element, C>(dk, dv, smem, smem.queries[half], p, tile, place, edge);
      }
      half ^= 1;
    }
  }

  if constexpr (C::kKeys) {
    const float scale = p.score.scale;
    store_own<Element, C>(
        p.dk + head_offset(p.dk_strides, block.batch, block.head), p.dk_strides.row, s_first,
        shape.S, shape.D, dk, [&](int, int) { return scale; }, smem.k, place);
  }
  if constexpr (C::kValues) {
    const float scale = kGeneral && p.dropout.rng != nullptr ? p.dropout.scale : 1.0f;
    store_own<Element, C>(
        p.dv + head_offset(p.dv_strides, block.batch, block.head), p.dv_strides.row, s_first,
        shape.S, shape.Dv, dv, [&](int, int) { return scale; }, smem.v, place);
  }
}

template <class Element, int kHeadDim, bool kGeneral, Part kPart, int kTeamWarps>
Status launch_part(const AttentionBackwardParams& p, Stream stream) {
  using C = Config<kHeadDim, kGeneral, kPart, kTeamWarps>;
  const int64_t tiles = (int64_t{p.shape.S} + C::kBlockS - 1) / C::kBlockS;
  return launch_heads(attention_bwd_dkdv_sm80<Element, kHeadDim, kGeneral, kPart, kTeamWarps>, p,
                      tiles, p.shape.H / p.shape.group, C::kThreads,
                      sizeof(typename C::SharedStorage), stream);
}

}  // namespace attention_dkdv
}  // namespace fused_lm
