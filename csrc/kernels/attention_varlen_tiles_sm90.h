// What the warps of the packed forward hand each other: tiles of queries, and an attention of one
// head for each.
#pragma once

#include "kernels/attention_fwd_tiles_sm90.h"
#include "kernels/attention_sequences.h"

namespace fused_lm {
namespace attention_varlen {

using namespace attention_fwd;

// What a block is told about its next tile of queries. To the code of the dense forward it is a
// tile of an attention of one head and one batch, whose numbers are 0.
struct VarlenWork : Work {
  int head;          // of q
  PackedRows q, k;   // of the sequence
  int lower, upper;  // row t sees keys t + lower .. t + upper; in [-T, S]
};

// T, S, the band and where lse is, as the dense forward wants them; what it would do with a mask, a
// bias or dropout the compiler leaves out.
__device__ __forceinline__ AttentionForwardParams one_head(const AttentionVarlenParams& p,
                                                           const VarlenWork& work) {
  AttentionForwardParams one{};
  one.lse = p.lse + (static_cast<int64_t>(work.head) * p.bounds_q.rows + work.q.begin);
  one.shape = {1, 1, 1, work.q.length, work.k.length, p.D, p.Dv};
  one.score.lower = work.lower;
  one.score.upper = work.upper;
  one.score.scale = p.scale;
  one.score.scale_log2 = p.scale_log2;
  one.score.softcap = p.softcap;
  return one;
}

// The dense forward's tiles, with other Works and a barrier for values that are to be cut off.
template <int kHeadDim, bool kGeneralScores>
struct VarlenConfig : HopperConfig<kHeadDim, kGeneralScores> {
  using Dense = HopperConfig<kHeadDim, kGeneralScores>;
  using typename Dense::Keys;
  using typename Dense::Queries;
  // The search takes more than 24. A block has 168 for each of its 384 threads, or 128 of 512: more
  // than three times or four times that, by all warpgroups together, nobody would ever get.
  static constexpr int kProducerRegisters = Dense::kGroups == 2 ? 40 : Dense::kProducerRegisters;
  static constexpr int kConsumerRegisters = Dense::kGroups == 2 ? 232 : Dense::kConsumerRegisters;

  struct SharedStorage {
    Queries q[Dense::kQueries];  // without out: its place too, each warp in its own rows
    Keys k[Dense::kStages];
    Keys v[Dense::kStages];
    std::conditional_t<Dense::kOwnOut, Queries, typename Dense::NoOut> out;
    float pinned[Dense::kConsumers];
    VarlenWork work[kWorkSlots];
    TileBarriers<Dense::kQueries, Dense::kStages> barriers;
    uint64_t v_raw;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  static __device__ __forceinline__ Queries& out_tile(SharedStorage& smem) {
    if constexpr (Dense::kOwnOut) {
      return smem.out;
    } else {
      return smem.q[0];
    }
  }
};

}  // namespace attention_varlen
}  // namespace fused_lm
