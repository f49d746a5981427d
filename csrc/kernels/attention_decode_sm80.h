// Attention of a few queries to a KV cache, for every GPU since Ampere.
//
//   for each key tile:  s = scores;  online softmax (attention_softmax.h);  acc = acc + p v
//   warps, then splits:  m = max m_i;  l = sum l_i e^(m_i - m);  out = sum acc_i e^(m_i - m) / l
//
// The rows of a block are the queries of all heads that share a key head, 16 of them: a key is read
// once for the whole group. With one query and one head 15 rows of each product are zeros, which
// costs nothing: memory binds.
//
// Grid: one block per (16 rows, split, key head, sequence). A split is an equal part of the tiles
// that its rows see, cut on the GPU by the length of the sequence; the host knows the number of
// splits alone. A block whose part is empty says so and is gone.
//
// Warps share nothing but q: the tiles of a split go round among them, each has a ring of its own
// in shared memory, and statistics of its own for the same rows. So the loop has no barrier of the
// block; a __syncwarp per tile says that all lanes' copies have landed, and that nobody reads the
// stage any more which the next copies go to. At the end each warp's sums take the place of its
// tiles, and the block adds them up, in the order of the warps.
//
// Pages: the copies of a tile look up the block of every row, so blocks of any size are read in
// place. Rows outside of the keys that are seen are zeros in shared memory, and are not read.
//
// With one split the block stores out and lse; else sums and statistics, attention_decode_combine.h
// adds the splits up. Rows without a visible key: out = 0, lse = -inf.
//
// Bytes: reads the 2 (D + Dv) of each key that is seen once per 16 rows, q once per split; writes
// B H T (2 Dv + 4), and with splits reads and writes B H T (4 Dv + 8) for each. FLOPs:
// 64 kD per key.
//
// Sources: Milakov & Gimelshein 2018 (arXiv:1805.02867) alg. 3; Dao, Haziza, Massa & Sizov 2023,
// Flash-Decoding.
#pragma once

#include "kernels/attention_decode_combine.h"
#include "kernels/attention_decode_keys.h"
#include "kernels/attention_decode_tuning.h"
#include "kernels/attention_score.h"
#include "kernels/attention_softmax.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_decode {

using attention_fwd::Rows;

template <int kHeadDim>
struct Config {
  static constexpr int kD = kHeadDim;
  static constexpr DecodeTuning kTuning = attention_decode_tuning(kD);
  static constexpr int kWarps = kTuning.warps;
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kBlockS = kTuning.block_s;
  static constexpr int kStages = kTuning.stages;
  static constexpr int kM = kDecodeRows / kMmaRows;
  static constexpr int kScores = kBlockS / kMmaColumns;
  static constexpr int kSums = kD / kMmaColumns;
  static constexpr int kSteps = kD / kMmaDepth;
  static constexpr bool kHeld = kTuning.queries == QueryPlace::kRegisters;
  static constexpr int kSumsStride = kD + 8;  // four rows of float2 in different banks

  using Queries = SharedTile<kDecodeRows, kD>;
  struct Keys {
    SharedTile<kBlockS, kD> k;
    SharedTile<kBlockS, kD> v;
  };
  union Warp {
    Keys stages[kStages];
    float sums[kDecodeRows][kSumsStride];
  };
  struct SharedStorage {
    Queries q;
    Warp warps[kWarps];
    Extremes extremes[kWarps][kDecodeRows];
  };
};

// Hides the keys of a tile that a thread's rows don't see; s_first is that of its first score.
template <class C>
__device__ __forceinline__ void hide_unseen(Scores<C>& score, const KeyRange (&seen)[2],
                                            int s_first) {
  for_each_value<C::kM, C::kScores>([&](int m, int n, int e) {
    const int s = s_first + n * kMmaColumns + e % 2;
    const bool visible = s >= seen[e / 2].begin && s < seen[e / 2].end;
    score[m][n][e] = visible ? score[m][n][e] : kNoScore;
  });
}

// scale and softcap of attention_score.h; what hides keys is known here.
template <class C>
__device__ __forceinline__ void scale_scores(Scores<C>& score, const AttentionDecodeParams& p) {
  ScoreParams own{};
  own.scale = p.scale;
  own.softcap = p.softcap;
  finish_scores(score, ScoreTile<false>{}, own, false);
}

// A warp's sums and statistics to shared memory, over its tiles.
template <class C>
__device__ __forceinline__ void leave_sums(typename C::SharedStorage& smem, const Rows<C>& rows) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const FragmentLane at = fragment_lane(own_lane());
  __syncwarp();  // the last tile has been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row + 8 * half;
    const float sum = quad_sum(rows.sum[0][half]);
    if (at.column == 0) smem.extremes[warp][row].store(rows.max[0][half], sum);
    float* sRow = smem.warps[warp].sums[row] + at.column;
#pragma unroll
    for (int n = 0; n < C::kSums; ++n) {
      const float2 pair = {rows.acc[0][n][2 * half], rows.acc[0][n][2 * half + 1]};
      *reinterpret_cast<float2*>(sRow + n * kMmaColumns) = pair;
    }
  }
}

// The sums of all warps, added up and stored: as out and lse, or as those of a split. Each thread
// has four columns of a row at a time.
template <class Element, class C>
__device__ __forceinline__ void store_block(const AttentionDecodeParams& p,
                                            typename C::SharedStorage& smem, const Place& place) {
  constexpr int kPieces = C::kD / 4;
  const int rows = rows_per_head(p.shape);
  for (int i = static_cast<int>(threadIdx.x); i < kDecodeRows * kPieces; i += C::kThreads) {
    const int row = i / kPieces, column = i % kPieces * 4;
    if (place.row + row >= rows || column >= p.shape.Dv) continue;
    const Extremes total =
        combined<C::kWarps>(C::kWarps, [&](int warp) { return smem.extremes[warp][row].load(); });
    float sum[4] = {};
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) {
      const float factor = smem.extremes[warp][row].load().factor(total.max);
      const float4 own = *reinterpret_cast<const float4*>(&smem.warps[warp].sums[row][column]);
      sum[0] += factor * own.x, sum[1] += factor * own.y;
      sum[2] += factor * own.z, sum[3] += factor * own.w;
    }
    if (p.splits > 1) {
      store_split(p, place, row, column, sum, total);
    } else {
      store_row<kDTypeOf<Element>>(p, place.batch, place.kv_head, place.row + row, column, sum,
                                   total);
    }
  }
}

template <class Element, int kD>
__global__ void __launch_bounds__((Config<kD>::kThreads), (Config<kD>::kTuning.blocks_per_sm))
    attention_decode_sm80(AttentionDecodeParams p, int batch_first) {
  using C = Config<kD>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const Place place = place_of_block(p, batch_first);
  const int length = length_of(p, place.batch);
  const KeyRange keys = keys_of_block(p, place, length);
  const SplitTiles tiles = tiles_of_split<C>(keys, place.split, p.splits);
  if (tiles.count == 0 && p.splits > 1) {
    leave_empty(p, place);
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const auto start_of = [&](int i) { return tiles.first + (warp + i * C::kWarps) * C::kBlockS; };
  const int count = max(tiles.count - warp + C::kWarps - 1, 0) / C::kWarps;
  auto& stages = smem.warps[warp].stages;
  const auto copy_tile = [&](int i) {
    if (i < count) {
      typename C::Keys& stage = stages[i % C::kStages];
      copy_keys_async(stage.k, stage.v, p, place, start_of(i), keys);
    }
    ptx::cp_async_commit();
  };

  copy_queries_async<C::kThreads>(smem.q, p, place);
  ptx::cp_async_commit();
  for (int i = 0; i + 1 < C::kStages; ++i) copy_tile(i);
  ptx::cp_async_wait<C::kStages - 1>();
  __syncthreads();
  [[maybe_unused]] HeldOperands<C::kM, C::kSteps> held;
  if constexpr (C::kHeld) held.load(smem.q, own_lane(), 0);

  const FragmentLane at = fragment_lane(own_lane());
  const KeyRange seen[2] = {keys_of_row(p, place, length, at.row),
                            keys_of_row(p, place, length, at.row + 8)};
  Rows<C> rows;
  attention_fwd::start_rows<C>(rows);
  for (int i = 0; i < count; ++i) {
    ptx::cp_async_wait<C::kStages - 2>();
    __syncwarp();
    copy_tile(i + C::kStages - 1);
    typename C::Keys& stage = stages[i % C::kStages];
    Scores<C> score;
    const int lane = ptx::lane_index();
    if constexpr (C::kHeld) {
      multiply_transposed<Element>(score, held, stage.k, lane);
    } else {
      multiply_transposed<Element>(score, shared_operands(smem.q, lane, 0), stage.k, lane);
    }
    scale_scores<C>(score, p);
    hide_unseen<C>(score, seen, start_of(i) + at.column);
    attention_fwd::online_softmax<C>(score, rows, kLog2E);
    add_product<Element>(rows.acc, score, stage.v, ptx::lane_index());
  }
  leave_sums<C>(smem, rows);
  __syncthreads();
  store_block<Element, C>(p, smem, place);
}

template <class Element, int kD>
Status launch_tiles(const AttentionDecodeParams& p, Stream stream) {
  using C = Config<kD>;
  const int64_t tiles = decode_row_tiles(p.shape) * p.splits;
  return launch_grid(attention_decode_sm80<Element, kD>, p, tiles, p.shape.H / p.shape.group,
                     p.shape.B, C::kThreads, sizeof(typename C::SharedStorage), stream);
}

template <class Element>
Status launch_any(const AttentionDecodeParams& p, Stream stream) {
  const Status status = with_head_dim(p.shape, [&](auto head_dim) {
    return launch_tiles<Element, decltype(head_dim)::value>(p, stream);
  });
  if (status != kOk || p.splits == 1) return status;
  return launch_combine<kDTypeOf<Element>>(p, stream);
}

}  // namespace attention_decode
}  // namespace fused_lm
