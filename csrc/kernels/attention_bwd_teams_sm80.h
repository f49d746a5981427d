// Backward of softmax attention in teams of two warps, for head dims whose sums, or sums and
// features, leave a warp no room for 32 rows: what attention_bwd_dkdv_sm80.h computes above 128
// columns and attention_bwd_dq_sm80.h above 64, with 53 to 71 % of their reads of shared memory.
// attention_team.h says what a team is.
//
// Three passes. A block owns rows along the keys or the queries, x and y of them, and walks over
// tiles of the other axis:
//
//   pass       own x, y    other x, y   score = own x . x,  dP = own y . y
//   kKeys      k, v        q, dout      dk = scale ds^T x
//   kValues    k           q, dout      dv = P^T y          without dP
//   kQueries   q, dout     k, v         dq = scale ds x
//
// Shared memory: the own tiles, which stay, and one tile each of the other axis' x and y, since two
// of each would leave no room for 64 of its positions. While one is multiplied the other one
// arrives. kKeys and kQueries begin with dP, so that y is free when x, which is needed twice, is
// not yet; kValues is as the forward. lse and delta come with x, or are the own rows'.
//
// With dP first, delta and the cap's derivative meet it before P does: (dP - delta) (1 - tanh^2),
// then times P. So no register holds the derivative, or which values dropout keeps.
//
// Plain and general kernels, grid, bytes and FLOPs as without teams, by the sizes of these tiles.
#pragma once

#include <type_traits>

#include "kernels/attention_dropout.h"
#include "kernels/attention_gradients.h"
#include "kernels/attention_score.h"
#include "kernels/attention_team.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_bwd {

template <int kHeadDim, TeamPass kOfPass, int kWarps, bool kIsGeneral>
struct TeamConfig {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kIsGeneral;
  static constexpr TeamPass kPass = kOfPass;
  static constexpr bool kKeyRows = kPass != TeamPass::kQueries;
  static constexpr AttentionBackwardTuning kTuning =
      attention_backward_teams_tuning(kD, kPass, kWarps);
  static constexpr int kTeam = kTuning.team;
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockOwn = kTuning.block_own();
  static constexpr int kBlockOther = kTuning.block_other;
  static constexpr int kOwnOther = kBlockOther / kTeam;  // of the other axis, a warp's
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kScores = kOwnOther / kMmaColumns;
  static constexpr int kSums = kD / kTeam / kMmaColumns;
  // Four warps copy twice the rows of eight; beside features dk's addresses cost spills.
  static constexpr int kCopyUnroll =
      kGeneral && kPass == TeamPass::kKeys && kWarps == 4 && kD == 256 ? 2 : kBlockOther;

  struct SharedStorage {
    // x and y; at the end the result lies in the place of x.
    SharedTile<kBlockOwn, kD> own[kPass == TeamPass::kValues ? 1 : 2];
    SharedTile<kBlockOther, kD> x;
    SharedTile<kBlockOther, kD> y;
    Handover<TeamConfig> handover;
    std::conditional_t<kKeyRows, ColumnNumbers<kBlockOther>, RowNumbers<kBlockOwn>> numbers;
  };
};

// x or y along one axis of a head.
struct Side {
  const uint16_t* gRows;
  int64_t stride;
  int length, columns;
};

// What lies along the keys, k and v, or along the queries, q and dout.
template <bool kKeys>
__device__ __forceinline__ Side side_x(const AttentionBackwardParams& p, int batch, int head) {
  if constexpr (kKeys) {
    return {p.k + head_offset(p.k_strides, batch, head), p.k_strides.row, p.shape.S, p.shape.D};
  } else {
    return {p.q + head_offset(p.q_strides, batch, head), p.q_strides.row, p.shape.T, p.shape.D};
  }
}

template <bool kKeys>
__device__ __forceinline__ Side side_y(const AttentionBackwardParams& p, int batch, int head) {
  if constexpr (kKeys) {
    return {p.v + head_offset(p.v_strides, batch, head), p.v_strides.row, p.shape.S, p.shape.Dv};
  } else {
    return {p.dout + head_offset(p.dout_strides, batch, head), p.dout_strides.row, p.shape.T,
            p.shape.Dv};
  }
}

// The thread, and below the lane, read anew: addresses that are kept cost spills at 256 columns.
template <class C, class Tile>
__device__ __forceinline__ void copy_side(Tile& sTile, const Side& side, int first) {
  copy_rows_unrolled<C::kThreads, C::kCopyUnroll>(sTile, side.gRows, side.stride, first,
                                                  side.length, side.columns, ptx::thread_index());
}

// The tiles that a block walks over: those of its band, in every head that shares the own rows.
struct Walk {
  int head, tile;

  __device__ __forceinline__ Walk next(const BandTiles& band) const {
    return tile + 1 < band.count ? Walk{head, tile + 1} : Walk{head + 1, 0};
  }
};

template <class Element, int kD, TeamPass kPass, int kWarps, bool kGeneral>
__global__ void __launch_bounds__((TeamConfig<kD, kPass, kWarps, kGeneral>::kThreads),
                                  (TeamConfig<kD, kPass, kWarps, kGeneral>::kTuning.blocks_per_sm))
    attention_bwd_teams_sm80(AttentionBackwardParams p, int batch_first) {
  using C = TeamConfig<kD, kPass, kWarps, kGeneral>;
  constexpr bool kKeyRows = C::kKeyRows;
  constexpr bool kGradients = kPass != TeamPass::kValues;  // of scores, beside P
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionShape& shape = p.shape;
  const BlockTile block = block_tile(!kKeyRows && p.score.upper < shape.S, batch_first);
  const int own_first = block.tile * C::kBlockOwn;
  const int own_length = kKeyRows ? shape.S : shape.T;
  const int own_last = min(own_first + C::kBlockOwn, own_length) - 1;
  // Of the keys that a query sees, or, from a key's side, of the queries that see it.
  const BandTiles band = band_tiles<C::kBlockOther>(
      own_first, own_last, kKeyRows ? shape.T : shape.S, kKeyRows ? -p.score.upper : p.score.lower,
      kKeyRows ? -p.score.lower : p.score.upper);
  const int first_head = kKeyRows ? block.head * shape.group : block.head / shape.group;
  const int end_head = first_head + (kKeyRows ? shape.group : 1);
  const auto copy_x = [&](const Walk& at) {
    const int first = band.start<C::kBlockOther>(at.tile);
    copy_side<C>(smem.x, side_x<!kKeyRows>(p, block.batch, at.head), first);
    if constexpr (kKeyRows) copy_numbers<C::kThreads>(smem.numbers, p, block.batch, at.head, first);
    ptx::cp_async_commit();
  };
  const auto copy_y = [&](const Walk& at) {
    const int first = band.start<C::kBlockOther>(at.tile);
    copy_side<C>(smem.y, side_y<!kKeyRows>(p, block.batch, at.head), first);
    ptx::cp_async_commit();
  };
  if (band.count > 0) {
    copy_side<C>(smem.own[0], side_x<kKeyRows>(p, block.batch, block.head), own_first);
    if constexpr (kGradients) {
      copy_side<C>(smem.own[1], side_y<kKeyRows>(p, block.batch, block.head), own_first);
      copy_y({first_head, 0});
    } else {
      copy_x({first_head, 0});
    }
  }
  if constexpr (!kKeyRows) {
    load_numbers<C::kThreads>(smem.numbers, p, block.batch, block.head, own_first);
  }

  const TeamPlace place = team_place<C>(threadIdx.x);
  Sums<C> sums;
  fill_zero(sums);

  const bool drops = kGeneral && p.dropout.rng != nullptr;
  const float factor = drops ? p.dropout.scale : 1.0f;
  for (Walk walk{band.count > 0 ? first_head : end_head, 0}; walk.head < end_head;
       walk = walk.next(band)) {
    const Walk next = walk.next(band);
    const int start = band.start<C::kBlockOther>(walk.tile);
    const int lane = ptx::lane_index();
    const FragmentLane at = fragment_lane(lane);
    const int part = place.part * C::kOwnOther;  // where this warp's part of the other axis begins
    const int own = own_first + place.row + at.row;
    const int other = start + part + at.column;
    const ScoreTile<kKeyRows> tile{
        kKeyRows ? other : own,           kKeyRows ? own : other, shape.T, shape.S, block.batch,
        kKeyRows ? walk.head : block.head};
    const auto drop_some = [&](Scores<C>& value) {
      // Drawn up anew: five registers less in a loop that mostly needs none.
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      drop(value, tile, key, p.dropout.threshold);
    };
    [[maybe_unused]] Scores<C> dp;  // soon what P makes ds of
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (kGradients) {
      copy_x(walk);
      multiply_transposed<Element>(dp, shared_operands(smem.own[1], lane, place.row), smem.y, lane,
                                   part);
      if (drops) drop_some(dp);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (next.head < end_head) copy_y(next);
      if constexpr (kKeyRows) {
        subtract_delta<C>(dp, smem.numbers.delta + part, factor);
      } else {
        subtract_delta<C>(dp, smem.numbers, place.row, lane, factor);
      }
    } else {
      copy_y(walk);
    }

    Scores<C> score;
    multiply_transposed<Element>(score, shared_operands(smem.own[0], lane, place.row), smem.x, lane,
                                 part);
    if constexpr (kGeneral) {
      finish_scores(score, tile, p.score, band.edge(start), [&](int m, int n, int e, float tanh) {
        if constexpr (kGradients) dp[m][n][e] *= fmaf(-tanh, tanh, 1.0f);
      });
    } else if (band.edge(start)) {
      hide_outside_band(score, tile, p.score.lower, p.score.upper);
    }
    if constexpr (kKeyRows) {
      probabilities<C>(score, smem.numbers.row_lse + part, p.score.scale);
    } else {
      probabilities<C>(score, smem.numbers, place.row, lane, p.score.scale);
    }
    Operands<C> operands;
    if constexpr (kGradients) {
      for_each_value<C::kM, C::kScores>(
          [&](int m, int n, int e) { dp[m][n][e] *= score[m][n][e]; });
      hand_over<Element, C>(operands, dp, smem.handover);
      ptx::named_barrier_sync(team_barrier<C>(place), kTeamThreads<C>);
    } else {
      if (drops) drop_some(score);
      hand_over<Element, C>(operands, score, smem.handover);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (next.head < end_head) copy_x(next);
    }
    auto& factors = kGradients ? smem.x : smem.y;
    add_part<Element, C>(sums, operands, factors, kKeyRows ? ptx::lane_index() : lane, place.part,
                         place.part);
    take_over<C>(operands, smem.handover);
    add_part<Element, C>(sums, operands, factors, ptx::lane_index(), place.part ^ 1, place.part);
  }

  const float scale = kGradients ? p.score.scale : factor;
  uint16_t* gResult = kPass == TeamPass::kKeys ? p.dk : kPass == TeamPass::kValues ? p.dv : p.dq;
  const HeadStrides& strides = kPass == TeamPass::kKeys     ? p.dk_strides
                               : kPass == TeamPass::kValues ? p.dv_strides
                                                            : p.dq_strides;
  store_own<Element, C>(
      gResult + head_offset(strides, block.batch, block.head), strides.row, own_first, own_length,
      kGradients ? shape.D : shape.Dv, sums, [&](int, int) { return scale; }, smem.own[0], place);
}

template <class Element, int kD, TeamPass kPass, int kWarps, bool kGeneral>
Status launch_teams(const AttentionBackwardParams& p, Stream stream) {
  using C = TeamConfig<kD, kPass, kWarps, kGeneral>;
  const int64_t own_length = C::kKeyRows ? p.shape.S : p.shape.T;
  const int64_t tiles = (own_length + C::kBlockOwn - 1) / C::kBlockOwn;
  const int heads = C::kKeyRows ? p.shape.H / p.shape.group : p.shape.H;
  return launch_heads(attention_bwd_teams_sm80<Element, kD, kPass, kWarps, kGeneral>, p, tiles,
                      heads, C::kThreads, sizeof(typename C::SharedStorage), stream);
}

}  // namespace attention_bwd
}  // namespace fused_lm
