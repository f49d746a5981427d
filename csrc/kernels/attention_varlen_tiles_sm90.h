// What the warps of the packed forward hand each other: tiles of queries, found without a table of
// the sequences' tiles, and an attention of one head for each.
#pragma once

#include "kernels/attention_fwd_tiles_sm90.h"
#include "kernels/attention_varlen.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_varlen {

using namespace attention_fwd;

// Rows begin .. begin + length of a packed tensor.
struct PackedRows {
  int begin, length;
};

__device__ __forceinline__ int bound_at(const SequenceBounds& bounds, int i) {
  const int64_t value = bounds.wide ? static_cast<const int64_t*>(bounds.data)[i]
                                    : int64_t{static_cast<const int32_t*>(bounds.data)[i]};
  return static_cast<int>(value < 0 ? 0 : value > bounds.rows ? bounds.rows : value);
}

__device__ __forceinline__ PackedRows rows_of(const SequenceBounds& bounds, int i) {
  const int begin = bound_at(bounds, i);
  return {begin, max(bound_at(bounds, i + 1) - begin, 0)};
}

// Sequence i has the virtual tiles from begin_i / kBlockT + i on: since ceil(T / kBlockT) <=
// end / kBlockT - begin / kBlockT + 1, its own end before the next one's begin. At most one per
// sequence is empty. So the host knows how many there are, and a tile's sequence is the last one
// that begins at it or before: a search, of 32 parts a round, that all lanes of a warp make.
template <int kBlockT>
__device__ __forceinline__ int first_tile(const SequenceBounds& bounds, int sequence) {
  return bound_at(bounds, sequence) / kBlockT + sequence;
}

template <int kBlockT>
__device__ __forceinline__ int sequence_of(const SequenceBounds& bounds, int sequences, int tile) {
  const int lane = ptx::lane_index();
  int first = 0, count = sequences;
#pragma unroll 1
  while (count > 1) {
    const int step = (count + kWarpSize - 1) / kWarpSize;
    const int part = lane * step;
    const bool before = part < count && first_tile<kBlockT>(bounds, first + part) <= tile;
    // The first part is taken for granted: bounds that don't rise may say anything.
    const int last = kWarpSize - 1 - __clz(static_cast<int>(__ballot_sync(kAllLanes, before) | 1u));
    first += last * step;
    count = min(step, count - last * step);
  }
  return first;
}

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
