// Backward of softmax attention for Hopper above 128 columns: what attention_bwd_sm90.h says, where
// dk and dv of 64 keys per group would not fit its registers.
//
// A block owns 64 keys, and takes 128 queries per tile. Of P and ds a group of consumers makes its
// 64 queries, [queries, keys]; of dk and dv, [keys, columns], its half of the columns, summed over
// all queries of the tile; of dq, [queries, columns], its own queries. So P and ds go through
// shared memory, where both groups write their queries of them and read all, as P^T and ds^T; but
// for dq, which is a sum over the block's keys alone, ds is a left operand as it lies in the
// registers that it is made in. dq is made in two halves of the columns, since with dk and dv a
// whole one doesn't fit.
//
// Grid: one block per (64 keys, key-value head, batch). Warpgroup 0 produces: one thread copies.
//
// Plain kernels, per tile of queries and group; [ ]: what is under way meanwhile
//
//   issue s, dP | exponentials [dP] | ds, pack | P, ds to shared memory | issue half of dq |
//   both groups have written | issue dk, dv | add that half [dk, dv] | wait for dk |
//   issue the other half [dv] | wait for dv | wait for that half, add it
//
// P and ds have one place: who has the next dout, which has one too, knows that both groups have
// waited for dv, and for dk before it.
//
// dk comes before dv, since the next tile begins with q: with 256 columns it has one place, and
// arrives while dv and half of dq are made.
//
// clang-format off
// Barrier           who arrives                        who waits, and what for
//   k_full v_full   producer; bytes                    consumers: k and v, which stay
//   q_full          producer; bytes of q and lse       consumers: both
//   dout_full       producer; bytes of dout and delta  consumers: both
//   q_empty dout_empty  consumers: a lane per warp     producer: their places
//   kWeightsWritten all consumers                      all consumers: P and ds are whole
//   kTilesRead      all consumers                      all consumers: the places of k and v
//   kRowsStaged     all consumers                      two threads: dk and dv to be stored
// clang-format on
//
// Bytes: k and v once, 128 (D + Dv); per tile and block 256 (D + Dv) + 1040 read, mostly from the
// L2, and 512 kD added there; dk and dv once. FLOPs: 10 * 128 * 64 kD per tile.
//
// Sources: as attention_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_wide_consumer_sm90.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace attention_bwd {

// One tile of queries: adds to dk, dv and the sums of dq.
template <class Element, class C>
__device__ __forceinline__ void add_wide_tile(const WideConsumer<C>& own, Sums<C>& dk, Sums<C>& dv,
                                              unsigned n, int head, int t_first) {
  using Keys = typename C::Keys;
  using Queries = typename C::Queries;
  auto& smem = own.smem;
  auto& barriers = smem.barriers;
  const unsigned q_stage = n % C::kQueryStages, dout_stage = n % C::kDoutStages;
  Packed<C> gradients;
  {
    Scores<C> score, dp;
    ptx::mbarrier_wait(&barriers.q_full[q_stage], n / C::kQueryStages % 2);
    issue_transposed<Element, Queries, Keys>(score[0], own.queries(q_stage), smem.k.k_major(0));
    ptx::mbarrier_wait(&barriers.dout_full[dout_stage], n / C::kDoutStages % 2);
    issue_transposed<Element, Queries, Keys>(dp[0], own.douts(dout_stage), smem.v.k_major(0));
    tile_gradients<C>(own, score, dp, smem.lse[q_stage], smem.delta[dout_stage], head, t_first);
    Packed<C> probs;
    pack<Element, C>(probs, score);
    pack<Element, C>(gradients, dp);
    store_weights<C>(smem.probs, probs, own.group);
    store_weights<C>(smem.ds, gradients, own.group);
  }
  ptx::fence_proxy_async();
  Sums<C> dq;
  issue_dq_half<Element, C>(dq, gradients, smem.k.halves[0].mn_major());
  ptx::named_barrier_sync(kWeightsWritten, kConsumers);
  issue_half<Element, C>(dk, smem.ds, own.turned_queries(q_stage));
  issue_half<Element, C>(dv, smem.probs, own.turned_douts(dout_stage));
  ptx::wgmma_wait<2>();
  ptx::registers_fence(dq[0]);
  add_dq_half<C>(own, dq, 0, head, t_first);
  ptx::wgmma_wait<1>();
  ptx::registers_fence(dk[0]);
  release(&barriers.q_empty[q_stage]);
  issue_dq_half<Element, C>(dq, gradients, smem.k.halves[1].mn_major());
  ptx::wgmma_wait<1>();
  ptx::registers_fence(dv[0]);
  release(&barriers.dout_empty[dout_stage]);
  ptx::wgmma_wait<0>();
  ptx::registers_fence(dq[0]);
  add_dq_half<C>(own, dq, 1, head, t_first);
}

template <class Element, class C>
__device__ __forceinline__ void consume_wide(typename C::SharedStorage& smem,
                                             const typename C::Params& told,
                                             const QueryWalk<C>& walk, int key_head) {
  const WideConsumer<C> own{smem, told, walk, consumer_group()};
  Sums<C> dk, dv;
  fill_zero(dk);
  fill_zero(dv);
  if (!walk.empty()) {
    ptx::mbarrier_wait(&smem.barriers.k_full, 0);
    ptx::mbarrier_wait(&smem.barriers.v_full, 0);
    walk.for_each([&](unsigned n, int head, int t_first) {
      add_wide_tile<Element, C>(own, dk, dv, n, head, t_first);
    });
  }
  const AttentionBackwardParams& p = own.params();
  ptx::named_barrier_sync(kTilesRead, kConsumers);
  stage_rows<Element>(smem.v.halves[own.group], dv, kept_scale<C>(p), 0);
  stage_rows<Element>(smem.k.halves[own.group], dk, p.score.scale, 0);
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(kRowsStaged, kConsumers);
  if constexpr (C::kPacked) {
    // A box would reach into the next sequence.
    if (walk.s_first + kGroupKeys > p.shape.S) {
      if (own.group == 0) {
        store_rows(smem.v, told.dv(smem.packed.sequence, key_head), walk.s_first, 0);
      } else {
        store_rows(smem.k, told.dk(smem.packed.sequence, key_head), walk.s_first, 0);
      }
      return;
    }
  }
  if (own.thread() != 0) return;
  if (own.group == 0) {
    send_tile<C>(told.maps.dv, smem.v, walk, p.shape.Dv, key_head);
  } else {
    send_tile<C>(told.maps.dk, smem.k, walk, p.shape.D, key_head);
  }
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__((WideConfig<kHeadDim, kGeneral>::kThreads), 1)
    attention_bwd_wide_sm90(const __grid_constant__ HopperBackwardParams hopper, int batch_first) {
  using C = WideConfig<kHeadDim, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const BlockTile block = block_tile(false, batch_first);
  const QueryWalk<C> walk(hopper, block);
  start_block<C>(smem, hopper.maps);
  if (threadIdx.x < kGroupThreads) {
    ptx::registers_decrease<24>();
    if (threadIdx.x != 0 || walk.empty()) return;
    produce<C>(smem, hopper, walk, block.head);
  } else {
    ptx::registers_increase<240>();
    consume_wide<Element, C>(smem, hopper, walk, block.head);
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
