// What the warps of the packed backward share beside what the dense one's do: the sequence that a
// block's keys are of, and barriers for tiles in which one ends.
#pragma once

#include "kernels/attention_bwd_wide_tiles_sm90.h"
#include "kernels/attention_sequences.h"
#include "kernels/attention_varlen_bwd.h"

namespace fused_lm {
namespace attention_bwd {

using attention_varlen::bound_of_sequence;
using attention_varlen::PackedRows;
using attention_varlen::rows_of;
using attention_varlen::sequence_of;

// The sequence of a block. To the code of the dense backward it is an attention of one batch, whose
// queries and keys are counted from 0.
struct BlockSequence {
  PackedRows q, k;
  int lower, upper;  // row t sees keys t + lower .. t + upper; in [-T, S]
};

// Rows of dk or dv of one head and sequence.
struct HeadRows {
  uint16_t* g;  // its row 0
  int64_t stride;
  int columns, length;
};

// What the main kernel is told.
struct PackedBackwardParams {
  HopperBackwardMaps maps;  // of all rows
  AttentionVarlenBackwardParams packed;
  HopperBackwardRoom room;
  int query_tiles;  // of a head: those of attention_sequences.h

  __device__ __forceinline__ HeadRows dk(const BlockSequence& sequence, int key_head) const {
    const AttentionBackwardParams& p = packed.p;
    return {p.dk + head_offset(p.dk_strides, 0, key_head) + sequence.k.begin * p.dk_strides.row,
            p.dk_strides.row, p.shape.D, sequence.k.length};
  }
  __device__ __forceinline__ HeadRows dv(const BlockSequence& sequence, int key_head) const {
    const AttentionBackwardParams& p = packed.p;
    return {p.dv + head_offset(p.dv_strides, 0, key_head) + sequence.k.begin * p.dv_strides.row,
            p.dv_strides.row, p.shape.Dv, sequence.k.length};
  }
};

// Of one sequence: what consumers ask for. What the dense backward would do with a mask, a bias or
// dropout the compiler leaves out.
__device__ __forceinline__ AttentionBackwardParams
one_sequence(const AttentionVarlenBackwardParams& packed, const BlockSequence& sequence) {
  const AttentionShape& shape = packed.p.shape;
  AttentionBackwardParams one{};
  one.shape = {1, shape.H, shape.group, sequence.q.length, sequence.k.length, shape.D, shape.Dv};
  one.score.lower = sequence.lower;
  one.score.upper = sequence.upper;
  one.score.scale = packed.p.score.scale;
  one.score.scale_log2 = packed.p.score.scale_log2;
  one.score.softcap = packed.p.score.softcap;
  return one;
}

// The tiles of a dense backward. A tile that TMA brings and in which a sequence ends first comes to
// a barrier of the warp that cuts it off.
template <class Dense>
struct PackedConfig : Dense {
  struct PackedPart {
    BlockSequence sequence;
    uint64_t k_raw, v_raw;
    uint64_t q_raw[Dense::kQueryStages], dout_raw[Dense::kDoutStages];
  };
  using SharedStorage = typename Dense::template Storage<PackedPart>;
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  static constexpr bool kPacked = true;
  using Params = PackedBackwardParams;
  static __device__ __forceinline__ AttentionBackwardParams params(const Params& told,
                                                                   const SharedStorage& smem) {
    return one_sequence(told.packed, smem.packed.sequence);
  }
  static __device__ __forceinline__ int heads(const Params& told) { return told.packed.p.shape.H; }
};

// By a shuffle the compiler learns that a warp's lanes agree.
__device__ __forceinline__ int of_warp(int value) { return __shfl_sync(kAllLanes, value, 0); }

// The block's walk: tile `tile` of its sequence's keys.
template <class C>
__device__ __forceinline__ QueryWalk<C> packed_walk(const PackedBackwardParams& told,
                                                    const BlockSequence& given, int sequence,
                                                    int tile, int key_head) {
  const BlockSequence own{{of_warp(given.q.begin), of_warp(given.q.length)},
                          {of_warp(given.k.begin), of_warp(given.k.length)},
                          of_warp(given.lower),
                          of_warp(given.upper)};
  QueryWalk<C> walk(one_sequence(told.packed, own), of_warp(tile), key_head);
  walk.tiles = told.query_tiles;
  walk.first_tile = own.q.begin / C::kBlockT + of_warp(sequence);
  walk.first_key = own.k.begin;
  // As in the dense kernels; of the general ones that of 256 columns would spill.
  if constexpr (!C::kGeneral) {
    if (walk.s_first - own.upper >= own.q.length) walk.band.count = 0;
  }
  return walk;
}

// A group stores the 64 rows of its tile from `first` on, as far as the sequence goes; s_first is
// the tile's first key. Lanes take the chunks of a slab's row, then of those below: no bank
// conflict.
template <class Tile>
__device__ __forceinline__ void store_rows(Tile& sRows, const HeadRows& to, int s_first,
                                           int first) {
  constexpr int kSlabChunks = Tile::kSlabColumns / kChunkElements;
  const int thread = static_cast<int>(ptx::thread_index() % kGroupThreads);
  const int rows = min(to.length - s_first - first, kGroupKeys);
#pragma unroll 1
  for (int chunk = thread % kSlabChunks; chunk * kChunkElements < to.columns;
       chunk += kSlabChunks) {
#pragma unroll 1
    for (int i = thread / kSlabChunks; i < rows; i += kGroupThreads / kSlabChunks) {
      uint16_t* gRow = to.g + (s_first + first + i) * to.stride;
      *reinterpret_cast<uint4*>(gRow + chunk * kChunkElements) = *sRows.at(first + i, chunk);
    }
  }
}

}  // namespace attention_bwd
}  // namespace fused_lm
