// Backward of softmax attention for Hopper, up to 128 columns: dk, dv and dq in one pass, with
// copies by TMA, products by wgmma, and warps that do only one of the two.
//
//   P = exp(score - lse)                     dv = dropout(P)^T dout
//   dP = dropout(dout v^T)                   ds = P (dP - delta) (1 - tanh^2)
//   dk = scale ds^T q                        dq = scale ds k
//
// Why one pass, where attention_bwd_dkdv_sm80.h has two: 5 products instead of 7. The sums of dq
// are added to by the blocks of all keys, in fp32 and in any order, so the last bits of dq differ
// from run to run. Where they have to repeat, this kernel is launched for n tiles of keys at a
// time, one launch after the other, and each of the n has sums of its own, a slot: no two blocks
// meet in one, and the slots are added in their order at the end. Still 5 products, and nobody
// waits for another block. attention_bwd_order_sm90.h chooses n.
//
// Before: attention_bwd_prepare makes lse and delta of padded rows, and zeros. Behind:
// attention_bwd_finish scales and rounds dq (attention_bwd_rows_sm90.h).
//
// Grid: one block per (128 keys, key-value head, batch), which walks over the query tiles of all
// heads of its group. Warpgroup 0 produces: one thread copies, and one for each group of consumers
// adds dq. Each of the two others owns 64 keys, 16 whole ones per warp.
//
// Scores and dP are made transposed, [keys, queries]: in the registers that they come in, P^T and
// ds^T are the left operands of dv and dk. ds also goes through shared memory, where both groups
// write their keys of it, since dq is a sum over all keys: dq^T = k^T ds^T, [64 columns, queries].
// A group makes half of the columns, or with 64 columns all of them of half of the queries; of 96
// it makes 64, of which the second group adds 32.
//
// Plain kernels, per tile of queries and group; [ ]: what is under way meanwhile
//
//   issue s, dP | exponentials [dP] | ds, pack | issue dv | ds to shared memory [dv] |
//   both groups have written | issue dq, dk | add dq [dk] | wait for dk
//
// but those of 64 columns, which hold dq and dk back: attention_bwd_held_back_sm90.h.
//
// The general kernels wait for dP too before they look at scores, since the cap's derivative meets
// it where it is made.
//
// clang-format off
// Barrier           who arrives                        who waits, and what for
//   k_full v_full   producer; bytes                    consumers: k and v, which stay
//   q_full          producer; bytes of q and lse       consumers: both
//   dout_full       producer; bytes of dout and delta  consumers: both
//   q_empty dout_empty  consumers: a lane per warp     producer: their places
//   dq_full + g     group g: a lane per warp           thread that adds for g: its part of dq
//   dq_empty + g    that thread                        group g: the place of its part
//   kGradientsWritten  all consumers                   all consumers: ds is whole
//   kProductsIssued group 0, where groups are skewed   group 1: it issues s and dP now
//   kKeysRead       all consumers                      all consumers: dk may take the place of k
//   kGroupDone + g  group g                            its first thread: rows to be stored
// clang-format on
//
// ds has two places: who passes kGradientsWritten of the next tile has waited for dq of this one.
// So group 0 comes to kProductsIssued of a tile when group 1 has passed that of the tile before.
//
// Bytes: k and v once, 256 (D + Dv); per tile and block 2 block_t (D + Dv) + 8 block_t + 16 read,
// mostly from the L2, and 4 block_t kD added there; dk and dv once. FLOPs: 10 block_t 128 kD per
// tile.
//
// Sources: Dao 2023 (arXiv:2307.08691) alg. 2; Shah et al. 2024 (arXiv:2407.08608) section 3; slots
// as in FlashAttention-2's deterministic backward, whose blocks walk over the keys.
#pragma once

#include "kernels/attention_bwd_held_back_sm90.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace attention_bwd {

// One tile of queries: adds to dk, dv and the sums of dq.
template <class Element, class C>
__device__ __forceinline__ void add_tile(const Consumer<C>& own, Sums<C>& dk, Sums<C>& dv,
                                         unsigned n, int head, int t_first) {
  auto& barriers = own.smem.barriers;
  const unsigned stage = n % kStages;
  Packed<C> probs, gradients;
  {
    Scores<C> score, dp;
    if constexpr (C::kSkews) {
      if (own.group == 1) ptx::named_barrier_sync(kProductsIssued, kConsumers);
    }
    issue_scores<Element, C>(own, score, n);
    issue_dp<Element, C>(own, dp, n);
    if constexpr (C::kSkews) {
      if (own.group == 0) ptx::named_barrier_arrive(kProductsIssued, kConsumers);
    }
    tile_gradients<C>(own, score, dp, own.smem.lse[stage], own.smem.delta[stage], head, t_first);
    // Packed earlier, P would be held twice.
    pack<Element, C>(probs, score);
    pack<Element, C>(gradients, dp);
  }
  issue_sums<Element, C>(dv, probs, own.turned_douts(stage));
  store_gradients<C>(own.smem.ds[n % 2], gradients, own.group);
  ptx::named_barrier_sync(kGradientsWritten, kConsumers);
  DqTile<C> dq;
  issue_dq<Element, C>(dq, own.turned_keys(), own.gradients(n % 2));
  issue_sums<Element, C>(dk, gradients, own.turned_queries(stage));
  ptx::wgmma_wait<1>();
  ptx::registers_fence(dv[0]);
  ptx::registers_fence(dq);
  release(&barriers.dout_empty[stage]);
  add_dq<C>(own, dq, n, head, t_first);
  ptx::wgmma_wait<0>();
  ptx::registers_fence(dk[0]);
  release(&barriers.q_empty[stage]);
}

template <class Element, class C>
__device__ __forceinline__ void consume(typename C::SharedStorage& smem,
                                        const typename C::Params& told, const QueryWalk<C>& walk,
                                        int key_head) {
  const int group = consumer_group();
  const Consumer<C> own{smem, told, walk, group};
  Sums<C> dk, dv;
  fill_zero(dk);
  fill_zero(dv);
  if (!walk.empty()) {
    ptx::mbarrier_wait(&smem.barriers.k_full, 0);
    ptx::mbarrier_wait(&smem.barriers.v_full, 0);
    if constexpr (C::kHoldsBack) {
      add_tiles_held_back<Element, C>(own, dk, dv);
    } else {
      walk.for_each([&](unsigned n, int head, int t_first) {
        add_tile<Element, C>(own, dk, dv, n, head, t_first);
      });
    }
  }
  const AttentionBackwardParams& p = own.params();
  ptx::named_barrier_sync(kKeysRead, kConsumers);
  stage_rows<Element>(smem.v, dv, kept_scale<C>(p), group * kGroupKeys);
  stage_rows<Element>(smem.k, dk, p.score.scale, group * kGroupKeys);
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(kGroupDone + group, kGroupThreads);
  const int first = group * kGroupKeys;
  if constexpr (C::kPacked) {
    // A box would reach into the next sequence.
    if (walk.s_first + first + kGroupKeys > p.shape.S) {
      store_rows(smem.v, told.dv(smem.packed.sequence, key_head), walk.s_first, first);
      store_rows(smem.k, told.dk(smem.packed.sequence, key_head), walk.s_first, first);
      return;
    }
  }
  if (group_thread() != 0 || walk.s_first + first >= p.shape.S) return;
  send_rows<C>(told.maps.dv, smem.v, own, p.shape.Dv, key_head);
  send_rows<C>(told.maps.dk, smem.k, own, p.shape.D, key_head);
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

template <class Element, int kHeadDim, bool kGeneral, bool kLong>
__global__ void __launch_bounds__((HopperConfig<kHeadDim, kGeneral, kLong>::kThreads), 1)
    attention_bwd_sm90(const __grid_constant__ HopperBackwardParams hopper, int batch_first) {
  using C = HopperConfig<kHeadDim, kGeneral, kLong>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const BlockTile block = block_tile(false, batch_first);
  const QueryWalk<C> walk(hopper, block);
  start_block<C>(smem, hopper.maps);
  if (threadIdx.x < kGroupThreads) {
    ptx::registers_decrease<24>();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (threadIdx.x % kWarpSize != 0 || walk.empty()) return;
    if (warp == 0) produce<C>(smem, hopper, walk, block.head);
    if constexpr (C::kBulkAdds) {
      if (warp == 1 || warp == 2) add_gradients<C>(smem, hopper, walk, warp - 1);
    }
  } else {
    ptx::registers_increase<240>();
    consume<Element, C>(smem, hopper, walk, block.head);
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
