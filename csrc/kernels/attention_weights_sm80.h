// The attention weights as a tensor, recomputed from lse: for callers who ask to look at them.
//
//   weights = dropout(e^(score - lse))    [B, H, T, S], or its mean over heads [B, T, S]
//
// Grid: one block per (tile of [T, S], head, batch), key tiles fastest: blocks that run together
// share rows of q. For the mean one per (tile, batch), which walks over the heads and sums in
// registers: nothing of B H T S elements is stored. A warp owns 16 rows and all keys of the tile.
// Tiles outside of the band are written as zeros, without a look at q and k.
//
// Pipeline: slices of 64 columns of q and k, as attention_sliced.h says; the last slice of a head
// brings the first one of the next. Results leave through the slice that nobody reads.
//
// Bytes: writes the output once, 2 B H T S or 2 B T S; q and k come from the L2, 2 D (64 + 64)
// bytes per tile and head. FLOPs: 2 B H T S D, D rounded up to 64.
#pragma once

#include "kernels/attention_sliced.h"

namespace fused_lm {
namespace attention_weights {

using attention_sliced::TilePlace;
using C = attention_sliced::Config<SlicedPass::kWeights>;

struct SharedStorage {
  C::Slice slices[2];
};

template <class Element>
__global__ void __launch_bounds__(C::kThreads, C::kTuning.blocks_per_sm)
    attention_weights_sm80(AttentionWeightsParams p, int batch_first) {
  auto& smem = dynamic_smem<SharedStorage>();
  const AttentionShape& shape = p.shape;
  const unsigned s_tiles = static_cast<unsigned>(shape.S + C::kBlockS - 1) / C::kBlockS;
  const TilePlace place{static_cast<int>(blockIdx.x / s_tiles) * C::kBlockT,
                        static_cast<int>(blockIdx.x % s_tiles) * C::kBlockS};
  const int batch = static_cast<int>(blockIdx.z) + batch_first;
  const int first_head = static_cast<int>(blockIdx.y);
  const attention_sliced::TileBand band = attention_sliced::tile_band<C>(place, shape, p.score);
  const int heads_here = p.average_heads ? shape.H : 1;
  const int end_head = band.visible ? first_head + heads_here : first_head;

  const int row = static_cast<int>(threadIdx.x / kWarpSize) * C::kTuning.rows_per_warp;
  attention_sliced::Product<C> sum;
  fill_zero(sum);
  int own = 0;
  if (band.visible) {
    const auto first = attention_sliced::queries_and_keys(p, batch, first_head);
    attention_sliced::copy_slice<C>(smem.slices[0], first, place, shape, 0);
  }
  for (int head = first_head; head < end_head; ++head) {
    attention_sliced::Product<C> score;
    const auto operands = attention_sliced::queries_and_keys(p, batch, head);
    attention_sliced::multiply_slices<Element, C>(
        score, operands, place, shape, smem.slices, own, row, [&](C::Slice& slice) {
          if (head + 1 == end_head) return;
          const auto next = attention_sliced::queries_and_keys(p, batch, head + 1);
          attention_sliced::copy_slice<C>(slice, next, place, shape, 0);
        });
    const auto tile = attention_sliced::score_tile<C>(place, shape, row, batch, head);
    attention_sliced::finish_probabilities<C>(score, tile, p.score, band.edge, p.lse, shape.H);
    if (p.dropout.rng != nullptr) {
      drop(score, tile, dropout_key(p.dropout.rng, batch, head), p.dropout.threshold);
    }
    for_each_value<C::kM, C::kN>([&](int m, int n, int e) { sum[m][n][e] += score[m][n][e]; });
  }

  const int64_t plane = static_cast<int64_t>(batch) * gridDim.y + blockIdx.y;
  attention_sliced::store_tile<kDTypeOf<Element>, C>(
      p.weights + plane * shape.T * shape.S, sum, p.dropout.scale / static_cast<float>(heads_here),
      place, shape, smem.slices[own].rows, row);
}

template <class Element>
Status launch_any(const AttentionWeightsParams& p, Stream stream) {
  const int64_t t_tiles = (int64_t{p.shape.T} + C::kBlockT - 1) / C::kBlockT;
  const int64_t s_tiles = (int64_t{p.shape.S} + C::kBlockS - 1) / C::kBlockS;
  return launch_heads(attention_weights_sm80<Element>, p, t_tiles * s_tiles,
                      p.average_heads ? 1 : p.shape.H, C::kThreads, sizeof(SharedStorage), stream);
}

}  // namespace attention_weights
}  // namespace fused_lm
