// Forward of softmax attention in teams of two warps, for head dims whose sums, or sums and
// features, leave a warp no room for 32 rows: what attention_fwd_sm80.h computes, with half of its
// reads of k and v from shared memory. attention_team.h says what a team is.
//
// A team owns 32 queries. Of a tile of keys each of its warps makes the scores of one half, and of
// the sums each holds half of the columns. They tell each other the maxima that they found in every
// tile, 32 numbers, so that both subtract the same. A vote on whether any has grown, by bar.red,
// took as long on an H200, and compute-sanitizer's racecheck took it for a race.
//
// Shared memory: q [block_t, D], which stays, k and v [block_s, D], one tile each: v arrives while
// scores are made, the next k while they are multiplied by v; p, 16 bits, and maxima from warp to
// warp. One tile of each leaves room for long ones, and
// needs two barriers per tile. The first one says that k has landed and that nobody reads v any
// more; the second one, that v has landed, that nobody reads k any more, and that each warp finds
// the other one's p.
//
// Plain and general kernels, bytes, FLOPs and rows without a visible key are as in
// attention_fwd_sm80.h.
#pragma once

#include "kernels/attention_dropout.h"
#include "kernels/attention_score.h"
#include "kernels/attention_softmax.h"
#include "kernels/attention_team.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_fwd {

template <int kHeadDim, int kWarps, bool kIsGeneral>
struct TeamConfig {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kIsGeneral;
  static constexpr AttentionTuning kTuning = attention_forward_teams_tuning(kD, kGeneral, kWarps);
  static constexpr int kTeam = kTuning.team;
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockT = kTuning.block_t();
  static constexpr int kBlockS = kTuning.block_s;
  static constexpr int kOwnS = kBlockS / kTeam;  // keys of a warp
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kScores = kOwnS / kMmaColumns;
  static constexpr int kSums = kD / kTeam / kMmaColumns;

  struct SharedStorage {
    SharedTile<kBlockT, kD> q;  // at the end: out
    SharedTile<kBlockS, kD> k;
    SharedTile<kBlockS, kD> v;
    Handover<TeamConfig> probs;
    float rows[kThreads / kWarpSize][kM * kMmaRows];  // maxima; at the end sums
  };
};

// What body(own, other) makes of this warp's number for each row and the other one's, which pass
// through shared memory. The last ones that did have been read before a barrier of the block.
template <class C, class Body>
__device__ __forceinline__ void combine_rows(RowValues<C>& value, typename C::SharedStorage& smem,
                                             const TeamPlace& place, const Body& body) {
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const FragmentLane at = fragment_lane(ptx::lane_index());
  float* sOwn = smem.rows[warp] + at.row;
  const float* sOther = smem.rows[warp ^ 1] + at.row;
  for_each_row<C>([&](int m, int half) {
    if (at.column == 0) sOwn[m * kMmaRows + half * 8] = value[m][half];
  });
  ptx::named_barrier_sync(team_barrier<C>(place), kTeamThreads<C>);
  for_each_row<C>([&](int m, int half) {
    value[m][half] = body(value[m][half], sOther[m * kMmaRows + half * 8]);
  });
}

template <class Element, int kD, int kWarps, bool kGeneral>
__global__ void __launch_bounds__((TeamConfig<kD, kWarps, kGeneral>::kThreads),
                                  (TeamConfig<kD, kWarps, kGeneral>::kTuning.blocks_per_sm))
    attention_fwd_teams_sm80(AttentionForwardParams p, int batch_first) {
  using C = TeamConfig<kD, kWarps, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionShape& shape = p.shape;
  const BlockTile block = block_tile(p.score.upper < shape.S, batch_first);
  const int block_first = block.tile * C::kBlockT;
  const int block_last = min(block_first + C::kBlockT, shape.T) - 1;
  const BandTiles band =
      band_tiles<C::kBlockS>(block_first, block_last, shape.S, p.score.lower, p.score.upper);
  const int kv_head = block.head / shape.group;
  // With features, what depends on the thread is read anew for each tile: kept, it costs spills.
  const auto thread_now = [] { return kGeneral ? ptx::thread_index() : threadIdx.x; };
  const auto copy_k = [&](int start) {
    copy_rows_async<C::kThreads>(smem.k, p.k + head_offset(p.k_strides, block.batch, kv_head),
                                 p.k_strides.row, start, shape.S, shape.D, thread_now());
    ptx::cp_async_commit();
  };
  const auto copy_v = [&](int start) {
    copy_rows_async<C::kThreads>(smem.v, p.v + head_offset(p.v_strides, block.batch, kv_head),
                                 p.v_strides.row, start, shape.S, shape.Dv, thread_now());
    ptx::cp_async_commit();
  };
  if (band.count > 0) {
    copy_rows_async<C::kThreads>(smem.q, p.q + head_offset(p.q_strides, block.batch, block.head),
                                 p.q_strides.row, block_first, shape.T, shape.D);
    copy_k(band.start<C::kBlockS>(0));
  }

  const float unit = kGeneral ? 1.0f : p.score.scale;
  const float unit_log2 = kGeneral ? kLog2E : p.score.scale_log2;
  Rows<C> rows;
  start_rows<C>(rows);

  const bool drops = kGeneral && p.dropout.rng != nullptr;
  for (int i = 0; i < band.count; ++i) {
    const int start = band.start<C::kBlockS>(i);
    ptx::cp_async_wait<0>();
    __syncthreads();
    copy_v(start);

    const int lane = own_lane();
    const TeamPlace place = team_place<C>(thread_now());
    const FragmentLane at = fragment_lane(kGeneral ? ptx::lane_index() : lane);
    const int own_keys = place.part * C::kOwnS;
    Scores<C> score;
    multiply_transposed<Element>(score, shared_operands(smem.q, lane, place.row), smem.k, lane,
                                 own_keys);
    const ScoreTile<false> tile{block_first + place.row + at.row,
                                start + own_keys + at.column,
                                shape.T,
                                shape.S,
                                block.batch,
                                block.head};
    if constexpr (kGeneral) {
      finish_scores(score, tile, p.score, band.edge(start));
    } else if (band.edge(start)) {
      hide_outside_band(score, tile, p.score.lower, p.score.upper);
    }
    RowValues<C> largest;
    row_maxima<C>(largest, score, rows);
    combine_rows<C>(largest, smem, place, [](float a, float b) { return fmaxf(a, b); });
    raise_maxima<C>(rows, largest, unit_log2);
    exponentials<C>(score, rows, unit_log2);
    if (drops) {
      // Drawn up anew: five registers less in a loop that mostly needs none.
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      drop(score, tile, key, p.dropout.threshold);
    }
    Operands<C> operands;
    hand_over<Element, C>(operands, score, smem.probs);

    ptx::cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < band.count) copy_k(band.start<C::kBlockS>(i + 1));
    add_part<Element, C>(rows.acc, operands, smem.v, lane, place.part, place.part);
    take_over<C>(operands, smem.probs);
    // The lane read anew: addresses that are kept cost spills.
    add_part<Element, C>(rows.acc, operands, smem.v, ptx::lane_index(), place.part ^ 1, place.part);
  }

  const TeamPlace place = team_place<C>(threadIdx.x);
  for_each_row<C>([&](int m, int half) { rows.sum[m][half] = quad_sum(rows.sum[m][half]); });
  combine_rows<C>(rows.sum, smem, place, [](float a, float b) { return a + b; });
  finish_rows<C>(p, rows, block, block_first + place.row, place.part == 0, unit,
                 drops ? p.dropout.scale : 1.0f,
                 [&](int m, int half) { return rows.sum[m][half]; });
  store_own<Element, C>(
      p.out + head_offset(p.out_strides, block.batch, block.head), p.out_strides.row, block_first,
      shape.T, shape.Dv, rows.acc, [&](int m, int half) { return rows.sum[m][half]; }, smem.q,
      place);
}

template <class Element, int kD, int kWarps, bool kGeneral>
Status launch_teams(const AttentionForwardParams& p, Stream stream) {
  using C = TeamConfig<kD, kWarps, kGeneral>;
  const int64_t tiles = (int64_t{p.shape.T} + C::kBlockT - 1) / C::kBlockT;
  return launch_heads(attention_fwd_teams_sm80<Element, kD, kWarps, kGeneral>, p, tiles, p.shape.H,
                      C::kThreads, sizeof(typename C::SharedStorage), stream);
}

}  // namespace attention_fwd
}  // namespace fused_lm
