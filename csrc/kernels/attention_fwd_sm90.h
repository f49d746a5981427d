// Forward of softmax attention for Hopper: the pass over the keys of attention_fwd_sm80.h, with
// copies by TMA, products by wgmma, and warps that do only one of the two.
//
//   for each key tile:  s = q k^T;  p, l, decay: the online softmax (attention_softmax_sm90.h)
//                       acc = decay acc + dropout(p) v
//   out = acc / l;  lse = ln of the sum of e^s
//
// Grid: a block per multiprocessor. A block takes tiles of queries of a head, the first by its own
// number, the others from a counter in global memory, in the order of attention_fwd_tiles_sm90.h.
// Warpgroup 0 produces: one of its threads takes tiles and copies q and k, one copies v. Each of
// the others consumes 64 queries of the tile, 16 whole rows per warp.
//
// Shared memory: q [queries, block_t, D], k and v [stages, block_s, D], each a ring; out [block_t,
// D] where there is room for a second q too, or in q's place. Tiles are slabs of 64 columns, drawn
// in matrix_descriptor.h. What a head dim has less than the compiled one, and queries and keys
// behind the last, TMA fills with zeros. Scores lie in the fragments of ptx/mma.h; packed they are
// the left operand of p v.
//
// Plain kernels: a group issues s of a tile before p v of the one before it, so that its softmax
// runs beside p v; and groups take turns in issuing, so that one's softmax runs beside the other's
// products. Two groups, key tiles 1, 2, ..:
//
//   tensor cores   s1 of A | pv0 of A | s1 of B | pv0 of B | s2 of A | pv1 of A | s2 of B | ..
//   group A        issue   | softmax 1 . . . . . | pack p1 | issue   | softmax 2 . . . . .
//   group B        . . . . . . . . .  | issue    | softmax 1 . . . . . | pack p1  | issue | ..
//
// Tiles in which a key may be hidden come first, in a loop of their own. Where a tile of queries is
// higher than one of keys, a group passes over those that none of its rows sees. The general
// kernels, with mask, key mask, bias, softcap, dropout and any scale, do one thing after the other;
// their groups overlap as it happens.
//
// clang-format off
// Barrier          who arrives                            who waits, and what for
//   q_full         producer of q; bytes of q              consumers, producer of v: q, the Work
//   q_empty        producer of v; consumers: a lane per   producer of q: q's place, out of which
//                  warp, or per group where out is there  TMA may read; an older Work
//   k_full v_full  their producer; bytes of the tile      consumers: the tile
//   k_empty v_empty  consumers: a lane per warp           their producer: its place
//   kTurn + g      group g and the one before it          group g: its turn to issue
//   kGroupDone + g group g                                group g: out's place; out is complete
// clang-format on
//
// Bytes: q once; per query tile the D + Dv columns of the keys that it sees, mostly from the L2;
// B H T (2 Dv + 4) written. FLOPs: 4 block_t block_s kD per key tile, whatever D and Dv are.
//
// The plain kernels compare q.k before it is scaled, so their scale is positive.
//
// Sources: Shah et al. 2024 (arXiv:2407.08608); Dao 2023 (arXiv:2307.08691) alg. 1; PTX 9.7.15.
#pragma once

#include "kernels/attention_dropout.h"
#include "kernels/attention_fwd_consumer_sm90.h"
#include "kernels/attention_fwd_producer_sm90.h"
#include "kernels/attention_score.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace attention_fwd {

// The plain walk over the keys. place: of q. n: how many tiles of keys the block has met before.
template <class Element, class C>
__device__ __forceinline__ void walk_overlapped(const Consumer<C>& own, BasedRows<C>& rows,
                                                const Work& work, int place, unsigned n) {
  using At = Stage<C::kStages>;
  auto& barriers = own.smem.barriers;
  const ScoreParams& how = own.p.score;
  const int hidden = pass_over_hidden<C>(own, work, n);
  const int count = work.walk.count - hidden, masked = work.walk.masked - hidden;
  n += hidden;
  const auto hide = [&](Scores<C>& score, int i) {
    hide_ends(score, own, work, work.walk.start<C::kBlockS>(hidden + i));
  };
  Packed<C> packed;
  RowValues<C> decay;
  const float growth = growth_of(how.scale_log2);
  {
    Scores<C> score;
    const At at(n);
    await_turn<C>(own.group);
    ptx::mbarrier_wait(&barriers.k_full[at.index], at.parity);
    issue_scores<Element, C>(score, own.queries(place), own.keys(at.index));
    pass_turn<C>(own.group);
    ptx::wgmma_wait<0>();
    ptx::registers_fence(score[0]);
    release(&barriers.k_empty[at.index]);
    if (masked > 0) hide(score, 0);
    raise_bases<C>(score, rows, decay, how.scale_log2, growth);
    exponentials<C>(score, rows, how.scale_log2);
    pack<Element, C>(packed, score);
  }
  const auto step = [&](int i, auto hides) {
    Scores<C> score;
    const At at(n + i), before(n + i - 1);
    await_turn<C>(own.group);
    ptx::mbarrier_wait(&barriers.k_full[at.index], at.parity);
    issue_scores<Element, C>(score, own.queries(place), own.keys(at.index));
    ptx::mbarrier_wait(&barriers.v_full[before.index], before.parity);
    issue_sums<Element, C>(rows.acc, packed, own.values(before.index));
    pass_turn<C>(own.group);
    ptx::wgmma_wait<1>();
    ptx::registers_fence(score[0]);
    release(&barriers.k_empty[at.index]);
    if constexpr (decltype(hides)::value) hide(score, i);
    const bool decays = raise_bases<C>(score, rows, decay, how.scale_log2, growth);
    exponentials<C>(score, rows, how.scale_log2);
    // Without it ptxas waits for p v before the exponentials.
    ptx::store_pinned(&own.smem.pinned[threadIdx.x - kGroupThreads],
                      rows.sum[0][0] + rows.sum[0][1]);
    ptx::wgmma_wait<0>();
    ptx::registers_fence(rows.acc[0]);
    release(&barriers.v_empty[before.index]);
    pack<Element, C>(packed, score);
    if (decays) multiply_rows<C>(rows.acc, decay);
  };
  int i = 1;
  for (; i < masked; ++i) step(i, std::true_type{});
  for (; i < count; ++i) step(i, std::false_type{});
  if constexpr (C::kOwnOut) release(&barriers.q_empty[place]);
  const At last(n + count - 1);
  ptx::mbarrier_wait(&barriers.v_full[last.index], last.parity);
  issue_sums<Element, C>(rows.acc, packed, own.values(last.index));
  ptx::wgmma_wait<0>();
  ptx::registers_fence(rows.acc[0]);
  release(&barriers.v_empty[last.index]);
}

// The general one.
template <class Element, class C>
__device__ __forceinline__ void walk_in_sequence(const Consumer<C>& own, BasedRows<C>& rows,
                                                 const Work& work, int place, unsigned n) {
  auto& barriers = own.smem.barriers;
  const AttentionForwardParams& p = own.p;
  const float growth = growth_of(kLog2E);
  for (int i = pass_over_hidden<C>(own, work, n); i < work.walk.count; ++i) {
    Scores<C> score;
    const Stage<C::kStages> at(n + i);
    ptx::mbarrier_wait(&barriers.k_full[at.index], at.parity);
    issue_scores<Element, C>(score, own.queries(place), own.keys(at.index));
    ptx::wgmma_wait<0>();
    ptx::registers_fence(score[0]);
    release(&barriers.k_empty[at.index]);
    const ScoreTile<false> tile = own.tile(work, work.walk.start<C::kBlockS>(i));
    finish_scores(score, tile, p.score, i < work.walk.masked);
    RowValues<C> decay;
    if (raise_bases<C>(score, rows, decay, kLog2E, growth)) multiply_rows<C>(rows.acc, decay);
    exponentials<C>(score, rows, kLog2E);
    if (p.dropout.rng != nullptr) {
      const DropoutKey key = dropout_key(p.dropout.rng, tile.batch, tile.head);
      drop_wide(score, tile, key, p.dropout.threshold);
    }
    Packed<C> packed;
    pack<Element, C>(packed, score);
    ptx::mbarrier_wait(&barriers.v_full[at.index], at.parity);
    issue_sums<Element, C>(rows.acc, packed, own.values(at.index));
    ptx::wgmma_wait<0>();
    ptx::registers_fence(rows.acc[0]);
    release(&barriers.v_empty[at.index]);
  }
  if constexpr (C::kOwnOut) release(&barriers.q_empty[place]);
}

template <class Element, class C>
__device__ __forceinline__ void consume(typename C::SharedStorage& smem,
                                        const AttentionForwardParams& p,
                                        const ptx::TensorMap& out_map) {
  // By a shuffle the compiler learns that a warp's lanes agree, and keeps descriptors once per
  // warp.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0) - 1;
  const Consumer<C> own{smem, p, group};
  if (group == C::kGroups - 1) pass_turn<C>(group);
  unsigned n = 0;
  for (unsigned round = 0;; ++round) {
    const Stage<C::kQueries> place(round);
    ptx::mbarrier_wait(&smem.barriers.q_full[place.index], place.parity);
    const Work& work = smem.work[round % kWorkSlots];
    if (work.tile.tile == kNoTile) break;
    BasedRows<C> rows;
    start_based_rows<C>(rows);
    if constexpr (C::kGeneral) {
      walk_in_sequence<Element, C>(own, rows, work, place.index, n);
    } else if (work.walk.count > 0) {
      walk_overlapped<Element, C>(own, rows, work, place.index, n);
    } else if constexpr (C::kOwnOut) {
      release(&smem.barriers.q_empty[place.index]);
    }
    n += work.walk.count;
    finish_sums<C>(own, rows, work);
    store_out<Element, C>(own, out_map, rows, work.tile);
  }
  if (group == 0) await_turn<C>(group);  // whose turn nobody took
  if constexpr (C::kOwnOut) ptx::bulk_wait_read<0>();
}

template <class Element, int kD, bool kGeneral>
__global__ void __launch_bounds__((HopperConfig<kD, kGeneral>::kThreads), 1)
    attention_fwd_sm90(const __grid_constant__ ptx::TensorMap q_map,
                       const __grid_constant__ ptx::TensorMap k_map,
                       const __grid_constant__ ptx::TensorMap v_map,
                       const __grid_constant__ ptx::TensorMap out_map,
                       const __grid_constant__ AttentionForwardParams p, const TileOrder order,
                       int* counter) {
  using C = HopperConfig<kD, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  if (threadIdx.x == 0) {
    constexpr int kWarps = C::kConsumers / kWarpSize;
    ptx::tma_prefetch(q_map);
    ptx::tma_prefetch(k_map);
    ptx::tma_prefetch(v_map);
    ptx::tma_prefetch(out_map);
    smem.barriers.init(kWarps, 1 + (C::kOwnOut ? kWarps : C::kGroups));
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) produce_keys<C>(smem, p, q_map, k_map, order, counter);
    if (threadIdx.x == kWarpSize) produce_values<C>(smem, v_map, p.shape.group);
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    consume<Element, C>(smem, p, out_map);
  }
}

}  // namespace attention_fwd
}  // namespace fused_lm
