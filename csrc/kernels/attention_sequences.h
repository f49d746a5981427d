// Sequences that lie packed: where each is, and of which one a tile of rows is, found without a
// table of the sequences' tiles.
#pragma once

#include "common/warp.h"
#include "kernels/attention_varlen.h"
#include "ptx/lane.h"

namespace fused_lm {
namespace attention_varlen {

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

// Sequence i has the virtual tiles from begin_i / kBlock + i on: since ceil(T / kBlock) <=
// end / kBlock - begin / kBlock + 1, its own end before the next one's begin. At most one per
// sequence is empty. So the host knows how many there are, and a tile's sequence is the last one
// that begins at it or before: a search, of 32 parts a round, that all lanes of a warp make.
template <int kBlock>
__device__ __forceinline__ int first_tile(const SequenceBounds& bounds, int sequence) {
  return bound_at(bounds, sequence) / kBlock + sequence;
}

template <int kBlock>
__device__ __forceinline__ int sequence_of(const SequenceBounds& bounds, int sequences, int tile) {
  const int lane = ptx::lane_index();
  int first = 0, count = sequences;
#pragma unroll 1
  while (count > 1) {
    const int step = (count + kWarpSize - 1) / kWarpSize;
    const int part = lane * step;
    const bool before = part < count && first_tile<kBlock>(bounds, first + part) <= tile;
    // The first part is taken for granted: bounds that don't rise may say anything.
    const int last = kWarpSize - 1 - __clz(static_cast<int>(__ballot_sync(kAllLanes, before) | 1u));
    first += last * step;
    count = min(step, count - last * step);
  }
  return first;
}

// Row t of a sequence with this many queries and keys sees keys t + lower .. t + upper: a bound
// that was meant for the packed tensors, moved to where the band is aligned, in [-T, S].
__device__ __forceinline__ int bound_of_sequence(int bound, const PackedRows& q,
                                                 const PackedRows& k, bool aligned_at_end) {
  const int diagonal = aligned_at_end ? k.length - q.length : 0;
  return min(max(bound + diagonal, -q.length), k.length);
}

}  // namespace attention_varlen
}  // namespace fused_lm
