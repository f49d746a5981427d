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
// Shared memory: q [block_t, D]; k and v [stages, block_s, D], each a ring; out [block_t, D] where
// there is room, or in q's place. Tiles are slabs of 64 columns, drawn in matrix_descriptor.h. What
// a head dim has less than the compiled one, and queries and keys behind the last, TMA fills with
// zeros. Scores lie in the fragments of ptx/mma.h; packed they are the left operand of p v.
//
// Plain kernels: a group issues s of a tile before p v of the one before it, so that its softmax
// runs beside p v; and groups take turns in issuing, so that one's softmax runs beside the other's
// products. Two groups, key tiles 1, 2, ..:
//
//   tensor cores   s1 of A | pv0 of A | s1 of B | pv0 of B | s2 of A | pv1 of A | s2 of B | ..
//   group A        issue   | softmax 1 . . . . . | pack p1 | issue   | softmax 2 . . . . .
//   group B        . . . . . . . . .  | issue    | softmax 1 . . . . . | pack p1  | issue | ..
//
// Tiles in which a key may be hidden come first, in a loop of their own. The general kernels, with
// mask, key mask, bias, softcap, dropout and any scale, do one thing after the other; their groups
// overlap as it happens.
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

#include "kernels/attention_fwd_producer_sm90.h"
#include "kernels/attention_fwd_walk_sm90.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace attention_fwd {

// What the producer says about the block's tile of queries number `round`.
template <class C>
__device__ __forceinline__ const Work& await_work(typename C::SharedStorage& smem, unsigned round) {
  const Stage<C::kQueries> place(round);
  ptx::mbarrier_wait(&smem.barriers.q_full[place.index], place.parity);
  return smem.work[round % kWorkSlots];
}

template <class Element, class C>
__device__ __forceinline__ void consume_plain(const Consumer<C>& own,
                                              const ptx::TensorMap& out_map) {
  const auto place = [](unsigned round) { return Stage<C::kQueries>(round).index; };
  PlainWalk<Element, C> walk(own, out_map);
  unsigned round = 0;
  const Work* work = &await_work<C>(own.smem, round);
  while (agreed(work->tile.tile != kNoTile)) {
    if (agreed(work->walk.count == 0)) {
      walk.store_nothing(*work, place(round));
      work = &await_work<C>(own.smem, ++round);
      continue;
    }
    int first = walk.begin(*work, place(round));
    for (;;) {
      walk.run(*work, first, place(round));
      if constexpr (!C::kOwnOut) walk.end(*work);  // which the next q waits for
      const Work* next = &await_work<C>(own.smem, ++round);
      const bool follows = agreed(next->tile.tile != kNoTile && next->walk.count > 0);
      if (C::kOwnOut && follows) first = walk.change(*work, *next, place(round));
      if (C::kOwnOut && !follows) walk.end(*work);
      work = next;
      if (!C::kOwnOut || !follows) break;
    }
  }
}

template <class Element, class C>
__device__ __forceinline__ void consume_general(const Consumer<C>& own,
                                                const ptx::TensorMap& out_map) {
  unsigned n = 0;
  for (unsigned round = 0;; ++round) {
    const Work& work = await_work<C>(own.smem, round);
    if (agreed(work.tile.tile == kNoTile)) break;
    BasedRows<C> rows;
    fill_zero(rows.acc);
    start_bases<C>(rows);
    walk_in_sequence<Element, C>(own, rows, work, Stage<C::kQueries>(round).index, n);
    n += work.walk.count;
    finish_sums<C>(own, rows.acc, totals_of<C>(rows), work);
    store_out<Element, C>(own, out_map, rows.acc, work.tile);
  }
}

template <class Element, class C>
__device__ __forceinline__ void consume(typename C::SharedStorage& smem,
                                        const AttentionForwardParams& p,
                                        const ptx::TensorMap& out_map) {
  const int group = agreed_value(static_cast<int>(threadIdx.x) / kGroupThreads) - 1;
  const Consumer<C> own{smem, p, group};
  if (group == C::kGroups - 1) pass_turn<C>(group);
  if constexpr (C::kGeneral) {
    consume_general<Element, C>(own, out_map);
  } else {
    consume_plain<Element, C>(own, out_map);
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
