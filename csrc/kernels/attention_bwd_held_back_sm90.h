// The walk over tiles of queries that holds dq and dk back: those of a tile are made beside the
// exponentials of the next, so that the tensor cores have enough to do meanwhile, and the barrier
// of both groups comes where they have scores to make. Per tile and group; [ ]: what is under way
//
//   issue s | both groups have written ds of the tile before | issue its dq and dk, and dP |
//   exponentials [dq, dk, dP] | hand dq over [dk, dP] | wait for dk [dP] | ds, pack | issue dv |
//   ds to shared memory [dv] | wait for dv
//
// Nothing is under way where the loop begins again, and of a tile's values nothing but ds, as left
// operands, goes over into the next turn: of more ptxas makes products one after the other.
//
// ds has two places here too: a group writes ds of a tile when it has waited for dq of the tile
// before, and passed kGradientsWritten behind the other's wait for dq of the one before that.
//
// The story of the kernel is in attention_bwd_sm90.h.
#pragma once

#include "kernels/attention_bwd_consumer_sm90.h"

namespace fused_lm {
namespace attention_bwd {

// Issues dq and dk of tile n, whose ds both groups have written.
template <class Element, class C>
__device__ __forceinline__ void issue_held(const Consumer<C>& own, DqTile<C>& dq, Sums<C>& dk,
                                           const Packed<C>& gradients, unsigned n) {
  issue_dq<Element, C>(dq, own.turned_keys(), own.gradients(n % 2));
  issue_sums<Element, C>(dk, gradients, own.turned_queries(n % kStages));
}

// P and ds of tile n have been made: dv, and ds to shared memory.
template <class Element, class C>
__device__ __forceinline__ void add_dv(const Consumer<C>& own, Sums<C>& dv, Packed<C>& gradients,
                                       const Scores<C>& score, const Scores<C>& ds, unsigned n) {
  const unsigned stage = n % kStages;
  Packed<C> probs;
  pack<Element, C>(probs, score);
  pack<Element, C>(gradients, ds);
  issue_sums<Element, C>(dv, probs, own.turned_douts(stage));
  store_gradients<C>(own.smem.ds[n % 2], gradients, own.group);
  ptx::wgmma_wait<0>();
  ptx::registers_fence(dv[0]);
  release(&own.smem.barriers.dout_empty[stage]);
}

// All tiles of the walk, of which there is one at least.
template <class Element, class C>
__device__ __forceinline__ void add_tiles_held_back(const Consumer<C>& own, Sums<C>& dk,
                                                    Sums<C>& dv) {
  static_assert(!C::kGeneral && C::kBulkAdds);
  auto& smem = own.smem;
  const QueryWalk<C>& walk = own.walk;
  Packed<C> gradients;
  int head = walk.first_head, i = 0;
  {
    Scores<C> score, dp;
    issue_scores<Element, C>(own, score, 0);
    issue_dp<Element, C>(own, dp, 0);
    plain_scores<C, 1>(own, score, smem.lse[0], head, walk.first_query(0));
    plain_gradients<C>(own, score, dp, smem.delta[0]);
    add_dv<Element, C>(own, dv, gradients, score, dp, 0);
  }
  const unsigned count = walk.count();
#pragma unroll 1
  for (unsigned n = 1; n < count; ++n) {
    walk.advance(head, i);
    Scores<C> score, dp;
    DqTile<C> dq;
    issue_scores<Element, C>(own, score, n);
    ptx::named_barrier_sync(kGradientsWritten, kConsumers);
    issue_held<Element, C>(own, dq, dk, gradients, n - 1);
    issue_dp<Element, C>(own, dp, n);
    plain_scores<C, 3>(own, score, smem.lse[n % kStages], head, walk.first_query(i));
    ptx::wgmma_wait<2>();
    ptx::registers_fence(dq);
    hand_over_dq<C>(own, dq, n - 1);
    ptx::wgmma_wait<1>();
    ptx::registers_fence(dk[0]);
    release(&smem.barriers.q_empty[(n - 1) % kStages]);
    plain_gradients<C>(own, score, dp, smem.delta[n % kStages]);
    add_dv<Element, C>(own, dv, gradients, score, dp, n);
  }
  DqTile<C> dq;
  ptx::named_barrier_sync(kGradientsWritten, kConsumers);
  issue_held<Element, C>(own, dq, dk, gradients, count - 1);
  ptx::wgmma_wait<0>();
  ptx::registers_fence(dq);
  ptx::registers_fence(dk[0]);
  hand_over_dq<C>(own, dq, count - 1);
}

}  // namespace attention_bwd
}  // namespace fused_lm
