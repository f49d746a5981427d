// What the warps of Hopper's attention backward share: sizes, shared memory, barriers, and which
// tiles of queries a block walks over.
#pragma once

#include "common/slab_tile.h"
#include "kernels/attention_bwd_hopper.h"
#include "kernels/attention_products.h"
#include "ptx/mbarrier.h"
#include "ptx/tensor_map.h"

namespace fused_lm {
namespace attention_bwd {

constexpr int kGroupThreads = 128;                   // a warpgroup
constexpr int kGroupKeys = 64;                       // that its products have
constexpr int kGroups = 2;                           // of consumers
constexpr int kConsumers = kGroups * kGroupThreads;  // threads
constexpr int kStages = 2;                           // tiles of queries in shared memory

struct Nothing {};

struct HopperBackwardMaps {
  ptx::TensorMap q, k, v, dout;  // boxes of a tile's rows and a slab's columns
  ptx::TensorMap dk, dv;         // of a group's rows
};

// What the main kernel is told.
struct HopperBackwardParams {
  HopperBackwardMaps maps;
  AttentionBackwardParams p;
  HopperBackwardRoom room;
  int first_tile;    // of keys, that block 0 of the launch has
  int slot_batches;  // from the sums of dq of a tile of keys to those of the next; 0: the same
};

template <int kHeadDim, bool kGeneralScores, bool kLong = false>
struct HopperConfig {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kGeneralScores;
  static constexpr bool kHasBand = !kLong;
  static constexpr HopperBackwardTuning kTuning =
      attention_backward_tuning_sm90(kD, kGeneral, kLong);
  static constexpr int kBlockT = kTuning.block_t;
  static constexpr int kBlockS = hopper_backward_keys(kD);
  static constexpr int kQueryStages = kStages, kDoutStages = kStages;
  static constexpr bool kQueriesFirst = false;  // to be released, and to come
  static constexpr bool kBulkAdds = kTuning.adds == GradientAdds::kBulk;
  static constexpr bool kSkews = kTuning.schedule == BackwardSchedule::kSkewed;
  static constexpr bool kHoldsBack = kTuning.schedule == BackwardSchedule::kHeldBack;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr int kM = 1;
  static constexpr int kScores = kBlockT / kMmaColumns;
  static constexpr int kSums = kD / kMmaColumns;
  static constexpr int kSteps = kBlockT / kProductDepth;  // of a sum over queries
  // dq is made transposed, [64, queries] by each group: with 64 columns all of them, of half of the
  // queries; with more a group's 64 of them, of all queries. Of 96 the second group has 32, in two
  // of its warps: its other rows are made of what lies behind k, and go nowhere.
  static constexpr bool kSplitsQueries = kD == kGroupKeys;
  static constexpr int kDqQueries = kSplitsQueries ? kBlockT / kGroups : kBlockT;
  static constexpr int kDq = kDqQueries / kMmaColumns;
  static constexpr int kDqFloats = kDqQueries * kGroupKeys;  // that a group makes
  // Sums of a tile: from a group's to the next one's, and from a fragment of a thread to its next.
  // With 96 columns the groups take turns, 128 threads and 64, so that there are no gaps.
  static constexpr int kTileFloats = kBlockT * kD;
  static constexpr bool kTurns = kD % kGroupKeys != 0;
  static constexpr int kGroupStride = kTurns ? kGroupThreads * kFragment : kDqFloats;
  static constexpr bool kDqTransposed = true;
  static constexpr int kFragmentStride = (kTurns ? 2 * kD : kGroupThreads) * kFragment;
  static_assert(!kTurns || !kBulkAdds);
  static constexpr int kLseFloats = kBlockT + kHugeFloats;
  static_assert(kD >= kGroupKeys && kD <= kGroups * kGroupKeys && kD % 32 == 0);

  // Of a group's part of dq: its first query and column, and whether a thread has any of it.
  static __device__ __forceinline__ constexpr int dq_query(int group) {
    return kSplitsQueries ? group * kDqQueries : 0;
  }
  static __device__ __forceinline__ constexpr int dq_column(int group) {
    return kSplitsQueries ? 0 : group * kGroupKeys;
  }
  static __device__ __forceinline__ constexpr bool has_dq(int group, int thread) {
    return !kTurns || group * kGroupThreads + thread < 2 * kD;
  }

  using Keys = SlabTile<kBlockS, kD>;
  using Queries = SlabTile<kBlockT, kD>;
  using Gradients = SlabTile<kBlockT, kBlockS>;  // ds [queries, keys]: a slab per group
  struct DqSums {
    alignas(16) float group[kGroups][kDqFloats];
  };

  struct Barriers {
    uint64_t k_full, v_full;
    uint64_t q_full[kStages], q_empty[kStages];
    uint64_t dout_full[kStages], dout_empty[kStages];
    uint64_t dq_full[kGroups], dq_empty[kGroups];
  };
  // PackedPart: what kernels of packed sequences have beside, or nothing.
  template <class PackedPart>
  struct Storage {
    Keys k;  // at the end: dk, each group in its own rows
    Keys v;  // at the end: dv
    Queries q[kStages];
    Queries dout[kStages];
    Gradients ds[2];  // a barrier per tile tells that one is whole, and the one before it read
    std::conditional_t<kBulkAdds, DqSums, Nothing> dq;
    alignas(16) float lse[kStages][kLseFloats];
    alignas(16) float delta[kStages][kBlockT];
    float pinned[kConsumers];
    Barriers barriers;
    PackedPart packed;
  };
  using SharedStorage = Storage<Nothing>;
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Of packed sequences: attention_varlen_bwd_tiles_sm90.h.
  static constexpr bool kPacked = false;
  using Params = HopperBackwardParams;
  static __device__ __forceinline__ const AttentionBackwardParams& params(const Params& told,
                                                                          const SharedStorage&) {
    return told.p;
  }
  static __device__ __forceinline__ int heads(const Params& told) { return told.p.shape.H; }
};

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kGradientsWritten = 1,  // all consumers: ds of a tile
  kKeysRead = 2,          // all consumers: k and v, by the last products
  kGroupDone = 3,         // + group: its rows of dk and dv
  kProductsIssued = 5,    // the second group, where it is skewed: scores and dP of the first
};

// The tiles of queries that a block's keys are seen by, in every head of its group.
template <class C>
struct QueryWalk {
  BandTiles band;
  int s_first, first_head, end_head;
  int batch = 0;
  int sums_batch = 0;  // of the sums of dq that the block adds to
  int tiles;           // of queries of a head, of all sequences where they lie packed
  int first_tile = 0;  // of those, where the sequence begins
  int first_key = 0;   // the row of the tensors that is its key 0
  bool ragged;         // keys end in this block

  // p: of an attention whose queries and keys are counted from 0.
  __device__ __forceinline__ QueryWalk(const AttentionBackwardParams& p, int key_tile,
                                       int key_head) {
    const AttentionShape& shape = p.shape;
    s_first = key_tile * C::kBlockS;
    const int s_last = min(s_first + C::kBlockS, shape.S) - 1;
    // From a key's side query t is visible where s - upper <= t <= s - lower.
    band = band_tiles<C::kBlockT>(s_first, s_last, shape.T, -p.score.upper, -p.score.lower);
    first_head = key_head * shape.group;
    end_head = first_head + shape.group;
    tiles = (shape.T + C::kBlockT - 1) / C::kBlockT;
    ragged = s_first + C::kBlockS > shape.S;
  }
  __device__ __forceinline__ QueryWalk(const HopperBackwardParams& hopper, const BlockTile& block)
      : QueryWalk(hopper.p, hopper.first_tile + block.tile, block.head) {
    batch = block.batch;
    sums_batch = block.tile * hopper.slot_batches + batch;
    // The tile in which queries end may reach to where the first of these keys would be seen.
    if (s_first - hopper.p.score.upper >= hopper.p.shape.T) band.count = 0;
  }
  // A key behind the last has a score of 0, and e^(0 - lse) may be infinite: it is hidden.
  __device__ __forceinline__ bool edge(int t_first) const {
    return ragged || (C::kHasBand && band.edge(t_first));
  }

  // Tiles before the one of this batch and head that begins with query t_first.
  __device__ __forceinline__ int64_t index(const typename C::Params& told, int of_batch, int head,
                                           int t_first) const {
    return (static_cast<int64_t>(of_batch) * C::heads(told) + head) * tiles + first_tile +
           t_first / C::kBlockT;
  }
  // Calls body(number, head, first query) for every tile, of which there is one at least. Two
  // loops, one in the other, or one that might not run at all, cost spills: the sums come from two
  // places then.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    const unsigned all = count();
    int head = first_head, i = 0;
    unsigned n = 0;
#pragma unroll 1
    do {
      body(n, head, first_query(i));
      advance(head, i);
    } while (++n < all);
  }
  // The same for who walks himself, over tile i of a head.
  __device__ __forceinline__ unsigned count() const { return band.count * (end_head - first_head); }
  __device__ __forceinline__ int first_query(int i) const { return band.start<C::kBlockT>(i); }
  __device__ __forceinline__ void advance(int& head, int& i) const {
    if (++i == band.count) i = 0, ++head;
  }
  __device__ __forceinline__ bool empty() const { return band.count == 0; }
};

}  // namespace attention_bwd
}  // namespace fused_lm
