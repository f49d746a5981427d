// Forward of softmax attention for every GPU since Ampere: one pass over the keys.
//
//   for each key tile:  s = scores;  where rowmax s > m + 8 ln 2 in any row of the warp:
//                         m' = max(m, rowmax s),  l = l e^(m - m'),  acc = acc e^(m - m')
//                       p = e^(s - m');  l = l + rowsum p;  acc = acc + dropout(p) v
//   out = acc / l;  lse = m + ln l
//
// Grid: one block per (query tile, head, batch), query tiles fastest. A warp owns 32 or 16 whole
// rows of the tile, so no two warps exchange anything; rows meet in quads of lanes only.
//
// Shared memory: q [block_t, D], k and v [2, block_s, D]: while a tile of keys is worked on, the
// next one is on its way into the other half. One barrier per tile says that the copies of all
// threads have landed, and that nobody reads the half any more which the next copies go to. p goes
// from the registers of one product into the next as its left operand. q is read again for every
// tile, or once: see attention_tuning.h.
//
// Two kernels per head dim. The plain one has q.k alone, a band (causal, window) and any T and S;
// tiles at the band's ends get a mask, behind a branch. The general one has mask, key mask, bias,
// softcap, dropout and any scale, each behind a branch that the grid takes alike.
//
// Bytes: reads B H T D of q once, and per query tile the D + Dv columns of the keys that it sees;
// writes B H T (2 Dv + 4). FLOPs: 4 block_t block_s kD per key tile, whatever D and Dv are.
//
// The sum l is of the undropped p. Rows without a visible key keep m = -inf and l = 0: out = 0,
// lse = -inf. The plain kernel compares q.k before it is scaled, so its scale is positive.
//
// Sources: Milakov & Gimelshein 2018 (arXiv:1805.02867) alg. 3; Dao 2023 (arXiv:2307.08691) alg. 1.
#pragma once

#include <type_traits>

#include "kernels/attention_dropout.h"
#include "kernels/attention_products.h"
#include "kernels/attention_score.h"
#include "kernels/attention_softmax.h"
#include "kernels/attention_tuning.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_fwd {

template <int kHeadDim, bool kGeneral>
struct Config {
  static constexpr int kD = kHeadDim;
  static constexpr AttentionTuning kTuning =
      kGeneral ? attention_forward_general_tuning(kD) : attention_forward_plain_tuning(kD);
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockT = kTuning.block_t();
  static constexpr int kBlockS = kTuning.block_s;
  static constexpr int kM = kTuning.rows_per_warp / kMmaRows;
  static constexpr int kScores = kBlockS / kMmaColumns;
  static constexpr int kSums = kD / kMmaColumns;
  static constexpr int kSteps = kD / kMmaDepth;

  static constexpr bool kHeld = kTuning.queries != QueryPlace::kShared;
  static constexpr bool kStaged = kTuning.queries == QueryPlace::kStaged;

  using Queries = SharedTile<kBlockT, kD>;
  struct Keys {
    SharedTile<kBlockS, kD> k;
    SharedTile<kBlockS, kD> v;
  };
  struct Separate {
    Queries q;  // at the end: out
    Keys keys[2];
  };
  union Staged {
    Queries q;
    Keys keys[2];
  };
  using SharedStorage = std::conditional_t<kStaged, Staged, Separate>;
};

// out and lse of a warp's rows. The rows lie where q did: a warp's own, or memory that a barrier
// has freed.
template <class Element, class C>
__device__ __forceinline__ void store_rows(const AttentionForwardParams& p, Rows<C>& rows,
                                           typename C::SharedStorage& smem, const BlockTile& block,
                                           int row, float unit, float dropout_scale) {
  if constexpr (C::kStaged) __syncthreads();  // the last keys have been read
  const int first = block.tile * C::kBlockT + row;
  finish_rows<C>(p, rows, block, first, true, unit, dropout_scale,
                 [&](int m, int half) { return quad_sum(rows.sum[m][half]); });
  store_sums<Element>(
      p.out + head_offset(p.out_strides, block.batch, block.head), p.out_strides.row, first,
      p.shape.T, p.shape.Dv, rows.acc, [&](int m, int half) { return rows.sum[m][half]; }, smem.q,
      row);
}

template <class Element, int kD, bool kGeneral>
__global__ void __launch_bounds__((Config<kD, kGeneral>::kThreads),
                                  (Config<kD, kGeneral>::kTuning.blocks_per_sm))
    attention_fwd_sm80(AttentionForwardParams p, int batch_first) {
  using C = Config<kD, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const AttentionShape& shape = p.shape;
  const BlockTile block = block_tile(p.score.upper < shape.S, batch_first);
  const int block_first = block.tile * C::kBlockT;
  const int block_last = min(block_first + C::kBlockT, shape.T) - 1;
  const BandTiles band =
      band_tiles<C::kBlockS>(block_first, block_last, shape.S, p.score.lower, p.score.upper);
  const int kv_head = block.head / shape.group;
  const uint16_t* gQ = p.q + head_offset(p.q_strides, block.batch, block.head);
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
    copy_rows_async<C::kThreads>(smem.q, gQ, p.q_strides.row, block_first, shape.T, shape.D);
    if constexpr (C::kStaged) {
      ptx::cp_async_commit();
    } else {
      copy_keys(0);
    }
  }

  FragmentLane at = fragment_lane(own_lane());
  const int row = static_cast<int>(threadIdx.x / kWarpSize) * C::kTuning.rows_per_warp;
  ScoreTile<false> tile{block_first + row + at.row, 0, shape.T, shape.S, block.batch, block.head};
  const float unit = kGeneral ? 1.0f : p.score.scale;
  Rows<C> rows;
  start_rows<C>(rows);
  [[maybe_unused]] HeldOperands<C::kM, C::kSteps> queries;
  if constexpr (C::kHeld) {
    if (band.count > 0) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      queries.load(smem.q, own_lane(), row);
      if constexpr (C::kStaged) {
        __syncthreads();
        copy_keys(0);
      }
    }
  }

  for (int i = 0; i < band.count; ++i) {
    const int start = band.start<C::kBlockS>(i);
    const bool edge = band.edge(start);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < band.count) copy_keys(i + 1);

    typename C::Keys& keys = smem.keys[i % 2];
    const int lane = ptx::lane_index();  // read anew: addresses that are kept cost spills
    if constexpr (kGeneral) {            // anew: kept, it costs spills
      at = fragment_lane(lane);
      tile.t_first = block_first + row + at.row;
    }
    tile.s_first = start + at.column;
    Scores<C> score;
    if constexpr (C::kHeld) {
      multiply_transposed<Element>(score, queries, keys.k, lane);
    } else {
      multiply_transposed<Element>(score, shared_operands(smem.q, lane, row), keys.k, lane);
    }
    if constexpr (kGeneral) {
      finish_scores(score, tile, p.score, edge);
    } else if (edge) {
      hide_outside_band(score, tile, p.score.lower, p.score.upper);
    }
    online_softmax<C>(score, rows, kGeneral ? kLog2E : p.score.scale_log2);
    if constexpr (kGeneral) {
      if (p.dropout.rng != nullptr) {
        // Drawn up anew: five registers less in a loop that mostly needs none.
        const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
        drop(score, tile, key, p.dropout.threshold);
      }
    }
    add_product<Element>(rows.acc, score, keys.v, ptx::lane_index());
  }

  const float dropout_scale = kGeneral && p.dropout.rng != nullptr ? p.dropout.scale : 1.0f;
  store_rows<Element>(p, rows, smem, block, row, unit, dropout_scale);
}

template <class Element, int kD, bool kGeneral>
Status launch_tiles(const AttentionForwardParams& p, Stream stream) {
  using C = Config<kD, kGeneral>;
  const int64_t tiles = (int64_t{p.shape.T} + C::kBlockT - 1) / C::kBlockT;
  return launch_heads(attention_fwd_sm80<Element, kD, kGeneral>, p, tiles, p.shape.H, C::kThreads,
                      sizeof(typename C::SharedStorage), stream);
}

}  // namespace attention_fwd
}  // namespace fused_lm
