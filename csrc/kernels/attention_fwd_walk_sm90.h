// The two ways in which a group of the Hopper forward goes through keys. The story is in
// attention_fwd_sm90.h.
#pragma once

#include "kernels/attention_dropout.h"
#include "kernels/attention_fwd_consumer_sm90.h"
#include "kernels/attention_score.h"

namespace fused_lm {
namespace attention_fwd {

// The plain way. Its steps follow one another through all tiles of queries: the first scores of the
// next one are issued with the last p v of this one, whose out is stored behind them.
template <class Element, class C>
struct PlainWalk {
  using At = Stage<C::kStages>;

  const Consumer<C>& own;
  const ptx::TensorMap& out_map;
  float unit, growth;
  unsigned n;  // tiles of keys that the block has met up to now
  BasedRows<C> rows;
  Packed<C> packed;  // p of the last tile, not yet multiplied with its v

  __device__ __forceinline__ PlainWalk(const Consumer<C>& consumer, const ptx::TensorMap& out)
      : own(consumer),
        out_map(out),
        unit(consumer.p.score.scale_log2),
        growth(growth_of(consumer.p.score.scale_log2)),
        n(0) {}

  // The first tile of keys of a block, or after a tile of queries without a key. Returns which of the
  // work's it was, as change does.
  __device__ __forceinline__ int begin(const Work& work, int place) {
    const int hidden = pass_over_hidden<C>(own, work, n);
    n += hidden;
    Scores<C> score;
    const At at(n);
    issue_first(score, at, place);
    pass_turn<C>(own.group);
    ptx::wgmma_wait<0>();
    take_scores(score, at);
    if (work.walk.masked > hidden) hide(score, work, hidden);
    fill_zero(rows.acc);
    start_bases<C>(rows);
    make_weights(score);
    pack<Element, C>(packed, score);
    return hidden;
  }

  // The last p v of a tile of queries, and the first tile of keys of the next.
  __device__ __forceinline__ int change(const Work& work, const Work& next, int place) {
    // Of passed tiles the places come after that of the v which is still needed here.
    static_assert(C::kMostHidden < C::kStages || !C::kOwnOut);
    const At before(n - 1);
    const int hidden = pass_over_hidden<C>(own, next, n);
    n += hidden;
    Scores<C> score;
    const At at(n);
    issue_first(score, at, place);
    issue_last(before);
    pass_turn<C>(own.group);
    ptx::wgmma_wait<1>();
    take_scores(score, at);
    if (next.walk.masked > hidden) hide(score, next, hidden);
    const RowTotals<C> totals = totals_of<C>(rows);
    start_bases<C>(rows);
    make_weights(score);
    await_sums(before);
    pack<Element, C>(packed, score);
    store(work, totals);
    fill_zero(rows.acc);
    return hidden;
  }

  // The tiles of keys after that one. Counted from a constant, which the compiler knows all lanes
  // to agree on.
  __device__ __forceinline__ void run(const Work& work, int first, int place) {
    const int count = work.walk.count - first, masked = work.walk.masked - first;
    int i = 1;
    for (; i < masked; ++i) step<true>(work, first, i, place);
    for (; i < count; ++i) step<false>(work, first, i, place);
    n += count;
    if constexpr (C::kOwnOut) release(&own.smem.barriers.q_empty[place]);
  }

  // The same where no tile of queries with keys follows at once.
  __device__ __forceinline__ void end(const Work& work) {
    const At before(n - 1);
    issue_last(before);
    ptx::wgmma_wait<0>();
    finish_release(before);
    store(work, totals_of<C>(rows));
  }

  // A tile of queries that sees no key.
  __device__ __forceinline__ void store_nothing(const Work& work, int place) {
    if constexpr (C::kOwnOut) release(&own.smem.barriers.q_empty[place]);
    fill_zero(rows.acc);
    start_bases<C>(rows);
    store(work, totals_of<C>(rows));
  }

 private:
  __device__ __forceinline__ void issue_first(Scores<C>& score, const At& at, int place) {
    await_turn<C>(own.group);
    ptx::mbarrier_wait(&own.smem.barriers.k_full[at.index], at.parity);
    issue_scores<Element, C>(score, own.queries(place), own.keys(at.index));
  }

  __device__ __forceinline__ void issue_last(const At& before) {
    ptx::mbarrier_wait(&own.smem.barriers.v_full[before.index], before.parity);
    issue_sums<Element, C>(rows.acc, packed, own.values(before.index));
  }

  __device__ __forceinline__ void take_scores(Scores<C>& score, const At& at) {
    ptx::registers_fence(score[0]);
    release(&own.smem.barriers.k_empty[at.index]);
  }

  __device__ __forceinline__ void hide(Scores<C>& score, const Work& work, int i) {
    hide_ends(score, own, work, work.walk.start<C::kBlockS>(i));
  }

  // Scores become p. Returns what acc is to be multiplied by, in `decay`, if at all.
  __device__ __forceinline__ bool make_weights(Scores<C>& score, RowValues<C>& decay) {
    const bool decays = raise_bases<C>(score, rows, decay, unit, growth);
    exponentials<C>(score, rows, unit);
    return decays;
  }
  __device__ __forceinline__ void make_weights(Scores<C>& score) {
    RowValues<C> decay;
    make_weights(score, decay);
  }

  // Behind the exponentials: without the store ptxas waits before them.
  __device__ __forceinline__ void await_sums(const At& before) {
    ptx::store_pinned(&own.smem.pinned[threadIdx.x - kGroupThreads],
                      rows.sum[0][0] + rows.sum[0][1]);
    ptx::wgmma_wait<0>();
    finish_release(before);
  }
  __device__ __forceinline__ void finish_release(const At& before) {
    ptx::registers_fence(rows.acc[0]);
    release(&own.smem.barriers.v_empty[before.index]);
  }

  template <bool kHides>
  __device__ __forceinline__ void step(const Work& work, int first, int i, int place) {
    Scores<C> score;
    const At at(n + i), before(n + i - 1);
    issue_first(score, at, place);
    issue_last(before);
    pass_turn<C>(own.group);
    ptx::wgmma_wait<1>();
    take_scores(score, at);
    if constexpr (kHides) hide(score, work, first + i);
    RowValues<C> decay;
    const bool decays = make_weights(score, decay);
    await_sums(before);
    pack<Element, C>(packed, score);
    if (decays) multiply_rows<C>(rows.acc, decay);
  }

  __device__ __forceinline__ void store(const Work& work, const RowTotals<C>& totals) {
    finish_sums<C>(own, rows.acc, totals, work);
    store_out<Element, C>(own, out_map, rows.acc, work.tile);
  }
};

// The general way: one thing after the other.
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

}  // namespace attention_fwd
}  // namespace fused_lm
