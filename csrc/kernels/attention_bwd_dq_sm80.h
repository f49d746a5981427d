// Backward of softmax attention, the pass over queries: dq for every GPU since Ampere.
//
//   P = exp(score - lse);  ds = P (dropout(dout v^T) - delta) (1 - tanh^2);  dq = scale ds k
//
// Why dq has a pass of its own is said in attention_bwd_dkdv_sm80.h.
//
// Grid: one block per (query tile, head, batch). A warp owns 32 or 16 rows; P and ds stay in the
// registers of its products, and ds goes as it is into the next one as the left operand.
//
// Shared memory: q and dout [block_t, D], lse and delta [block_t], which stay; k and v
// [2, block_s, D]: the next tile is on its way while one is worked on, with one barrier per tile,
// as in the forward.
//
// Bytes: reads q, dout, lse and delta once, and per query tile the D + Dv columns of the keys that
// it sees; writes B H T D. FLOPs: 6 block_t block_s kD per pair of tiles.
//
// Source: Dao 2023 (arXiv:2307.08691) alg. 2.
#pragma once

#include "kernels/attention_dropout.h"
#include "kernels/attention_gradients.h"
#include "kernels/attention_products.h"
#include "kernels/attention_score.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_dq {

template <int kHeadDim, bool kIsGeneral>
struct Config {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kIsGeneral;
  static constexpr AttentionBackwardTuning kTuning = attention_dq_tuning(kD, kGeneral);
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockT = kTuning.block_own();
  static constexpr int kBlockS = kTuning.block_other;
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kScores = kBlockS / kMmaColumns;
  static constexpr int kSums = kD / kMmaColumns;

  struct Keys {
    SharedTile<kBlockS, kD> k;
    SharedTile<kBlockS, kD> v;
  };
  struct SharedStorage {
    SharedTile<kBlockT, kD> q;  // at the end: dq; a warp reads and writes its own rows only
    SharedTile<kBlockT, kD> dout;
    Keys keys[2];
    RowNumbers<kBlockT> rows;
  };
};

// One key tile: adds to the sums. edge: the band may end in it.
template <class Element, class C>
__device__ __forceinline__ void add_tile(Sums<C>& dq, typename C::SharedStorage& smem,
                                         typename C::Keys& keys, const AttentionBackwardParams& p,
                                         const ScoreTile<false>& tile, int row, bool edge) {
  // Read anew where addresses that are kept cost spills.
  const int lane = C::kD <= 64 ? ptx::lane_index() : own_lane();
  Scores<C> score;
  [[maybe_unused]] Scores<C> slope;
  multiply_transposed<Element>(score, shared_operands(smem.q, lane, row), keys.k, lane);
  if constexpr (C::kGeneral) {
    finish_scores(score, slope, tile, p.score, edge);
  } else if (edge) {
    hide_outside_band(score, tile, p.score.lower, p.score.upper);
  }
  Scores<C> dp;
  multiply_transposed<Element>(dp, shared_operands(smem.dout, lane, row), keys.v, lane);
  float factor = 1.0f;
  if constexpr (C::kGeneral) {
    if (p.dropout.rng != nullptr) {
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      drop(dp, tile, key, p.dropout.threshold);
      factor = p.dropout.scale;
    }
  }
  score_gradients<C>(dp, score, smem.rows, row, lane, p.score.scale, factor);
  if constexpr (C::kGeneral) {
    if (p.score.softcap > 0.0f) {
      for_each_value<C::kM, C::kScores>(
          [&](int m, int n, int e) { dp[m][n][e] *= slope[m][n][e]; });
    }
  }
  add_product<Element>(dq, dp, keys.k, lane);
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__((Config<kHeadDim, kGeneral>::kThreads),
                                  (Config<kHeadDim, kGeneral>::kTuning.blocks_per_sm))
    attention_bwd_dq_sm80(AttentionBackwardParams p, int batch_first) {
  using C = Config<kHeadDim, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionShape& shape = p.shape;
  const BlockTile block = block_tile(p.score.upper < shape.S, batch_first);
  const int t_first = block.tile * C::kBlockT;
  const int t_last = min(t_first + C::kBlockT, shape.T) - 1;
  const BandTiles band =
      band_tiles<C::kBlockS>(t_first, t_last, shape.S, p.score.lower, p.score.upper);
  const int kv_head = block.head / shape.group;
  const uint16_t* gK = p.k + head_offset(p.k_strides, block.batch, kv_head);
  const uint16_t* gV = p.v + head_offset(p.v_strides, block.batch, kv_head);
  const auto copy_keys = [&](int i) {
    typename C::Keys& keys = smem.keys[i % 2];
    const int s_first = band.start<C::kBlockS>(i);
    copy_rows_async<C::kThreads>(keys.k, gK, p.k_strides.row, s_first, shape.S, shape.D);
    copy_rows_async<C::kThreads>(keys.v, gV, p.v_strides.row, s_first, shape.S, shape.Dv);
    ptx::cp_async_commit();
  };
  if (band.count > 0) {
    copy_rows_async<C::kThreads>(smem.q, p.q + head_offset(p.q_strides, block.batch, block.head),
                                 p.q_strides.row, t_first, shape.T, shape.D);
    copy_rows_async<C::kThreads>(smem.dout,
                                 p.dout + head_offset(p.dout_strides, block.batch, block.head),
                                 p.dout_strides.row, t_first, shape.T, shape.Dv);
    copy_keys(0);
  }

  FragmentLane at = fragment_lane(own_lane());
  const int row = static_cast<int>(threadIdx.x / kWarpSize) * C::kTuning.rows_per_warp;
  ScoreTile<false> tile{t_first + row + at.row, 0, shape.T, shape.S, block.batch, block.head};
  load_numbers<C::kThreads>(smem.rows, p, block.batch, block.head, t_first);
  Sums<C> dq;
  fill_zero(dq);
  for (int i = 0; i < band.count; ++i) {
    const int start = band.start<C::kBlockS>(i);
    const bool edge = band.edge(start);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < band.count) copy_keys(i + 1);
    if constexpr (kGeneral) {  // anew: kept, it costs spills
      at = fragment_lane(ptx::lane_index());
      tile.t_first = t_first + row + at.row;
    }
    tile.s_first = start + at.column;
    add_tile<Element, C>(dq, smem, smem.keys[i % 2], p, tile, row, edge);
  }

  const float scale = p.score.scale;
  store_sums<Element>(
      p.dq + head_offset(p.dq_strides, block.batch, block.head), p.dq_strides.row, t_first + row,
      shape.T, shape.D, dq, [&](int, int) { return scale; }, smem.q, row);
}

template <class Element, int kHeadDim, bool kGeneral>
Status launch_tiles(const AttentionBackwardParams& p, Stream stream) {
  using C = Config<kHeadDim, kGeneral>;
  const int64_t tiles = (int64_t{p.shape.T} + C::kBlockT - 1) / C::kBlockT;
  return launch_heads(attention_bwd_dq_sm80<Element, kHeadDim, kGeneral>, p, tiles, p.shape.H,
                      C::kThreads, sizeof(typename C::SharedStorage), stream);
}

}  // namespace attention_dq
}  // namespace fused_lm
