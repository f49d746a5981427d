// Which kernel of the packed forward runs, and what it is told.
#pragma once

#include "kernels/attention_fwd_launch_sm90.h"
#include "kernels/attention_varlen_fwd_sm90.h"

namespace fused_lm {
namespace attention_varlen {

// Sections of heads as in the dense forward, of which the L2 holds all keys and values, and in them
// one tile of every head after the other: heads of a group read the same keys, and heads of a row
// lie side by side. How long sequences are nobody knows here. Under a causal mask each begins with
// its last tiles, the longest, and the first sequence's first ones are what is left at the end.
inline TileOrder tile_order(const AttentionVarlenParams& p, int block_t) {
  const int64_t tiles = varlen_tiles(p.bounds_q.rows, p.sequences, block_t);
  const int64_t kv_bytes = int64_t{p.bounds_k.rows} * (p.D + p.Dv) * int64_t{sizeof(uint16_t)};
  const int64_t held = kSectionBytes / kv_bytes * p.group;
  const int64_t section = held < p.group ? p.group : held;
  return {static_cast<int>(tiles), p.H, static_cast<int>(section < p.H ? section : p.H),
          p.upper < kMaxVarlenRows};
}

// The dense forward's maps, of one batch: its functions make and use them.
template <class Element, int kD, bool kGeneral>
Status launch_varlen(const AttentionVarlenParams& p, int multiprocessors, int* tile_counter,
                     Stream stream) {
  using C = VarlenConfig<kD, kGeneral>;
  const int kv_heads = p.H / p.group, N = p.bounds_q.rows, M = p.bounds_k.rows;
  ptx::TensorMap q, k, v, out;
  const Status statuses[] = {
      map_heads<Element, typename C::Queries>(q, p.q, p.q_strides, 1, p.H, N, p.D, C::kBlockT),
      map_heads<Element, typename C::Keys>(k, p.k, p.k_strides, 1, kv_heads, M, p.D, C::kBlockS),
      map_heads<Element, typename C::Keys>(v, p.v, p.v_strides, 1, kv_heads, M, p.Dv, C::kBlockS),
      map_heads<Element, typename C::Queries>(out, p.out, p.out_strides, 1, p.H, N, p.Dv,
                                              kGroupRows)};
  for (const Status status : statuses) {
    if (status != kOk) return status;
  }
  const TileOrder order = tile_order(p, C::kBlockT);
  const int tiles = order.tiles * order.heads;
  const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
  int* counter = blocks < tiles ? tile_counter : nullptr;
  if (counter != nullptr) {
    const Status status = zero_async(counter, sizeof(*counter), stream);
    if (status != kOk) return status;
  }
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                            sizeof(typename C::SharedStorage), stream};
  return launch(attention_varlen_fwd_sm90<Element, kD, kGeneral>, config, q, k, v, out, p, order,
                counter);
}

// Plain and general kernels of every head dim, as of the dense forward and for its reasons.
template <class Element>
Status launch_any_varlen(const AttentionVarlenParams& p, int multiprocessors, int* tile_counter,
                         Stream stream) {
  ScoreParams score{};
  score.scale = p.scale;
  score.softcap = p.softcap;
  const AttentionShape shape{1, p.H, p.group, 0, 0, p.D, p.Dv};
  return with_hopper_head_dim(shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    return is_plain(score, DropoutParams{})
               ? launch_varlen<Element, kD, false>(p, multiprocessors, tile_counter, stream)
               : launch_varlen<Element, kD, true>(p, multiprocessors, tile_counter, stream);
  });
}

}  // namespace attention_varlen
}  // namespace fused_lm
