// What the warps of the Hopper forward hand each other: tiles of queries, in which order, and which
// tiles of keys each of them walks over.
#pragma once

#include "common/slab_tile.h"
#include "kernels/attention_tile.h"
#include "kernels/attention_tuning_sm90.h"
#include "ptx/barrier.h"
#include "ptx/mbarrier.h"

namespace fused_lm {
namespace attention_fwd {

// The order in which blocks take tiles: sections of heads whose keys and values the L2 holds
// together, in each of them one tile of every head after the other. Under a causal mask the last
// ones come first, which are the longest: what is left at the end is short. A section of fewer
// heads comes first of all, where what its few tiles leave uneven is made up for: at its end 132
// blocks would wait 3 to 4 % of the time for one another (by the sums of tiles, at 16 to 128
// heads).
struct TileOrder {
  int tiles;    // of queries per head
  int heads;    // of all batches together
  int section;  // heads per section
  bool reversed;

  __device__ __forceinline__ int count() const { return tiles * heads; }

  __device__ __forceinline__ BlockTile at(int index, int heads_per_batch) const {
    // As if the heads that the first section lacks were there, and done with.
    const int missing = (section - heads % section) % section;
    const int before = max((index / tiles + missing) / section * section - missing, 0);
    const int within = index - before * tiles;
    const int here = before == 0 ? section - missing : section;
    const int tile = within / here;
    const int head = before + within % here;
    return {reversed ? tiles - 1 - tile : tile, head % heads_per_batch, head / heads_per_batch};
  }
};

constexpr int kNoTile = -1;  // in BlockTile::tile: there are no more

// The tiles of keys that a tile of queries meets: those behind which the band or S may end, the
// last one first, then those in which the band may begin, then those that every row sees whole.
struct KeyWalk {
  int begin, full_begin, full_end;
  int count, masked;
  int late;  // of the masked ones, those behind full_end

  template <int kBlockS>
  __device__ __forceinline__ int start(int i) const {
    if (i >= masked) return full_begin + (i - masked) * kBlockS;
    return i < late ? full_end + (late - 1 - i) * kBlockS : begin + (i - late) * kBlockS;
  }
  // How many tiles, before the first that matters, begin behind the last key that any row up to
  // `last` may see; not all of them.
  template <int kBlockS>
  __device__ __forceinline__ int hidden(int last_key) const {
    const int seen = last_key < full_end ? 0 : (last_key - full_end) / kBlockS + 1;
    return max(min(late - seen, count - 1), 0);
  }
};

template <class C>
__device__ __forceinline__ KeyWalk key_walk(const AttentionForwardParams& p, int tile) {
  const int first = tile * C::kBlockT;
  const int last = min(first + C::kBlockT, p.shape.T) - 1;
  // Tiles are wide: a band may begin behind the last key, and in its tile all the same.
  if (first + p.score.lower >= p.shape.S) return {0, 0, 0, 0, 0, 0};
  const BandTiles band =
      band_tiles<C::kBlockS>(first, last, p.shape.S, p.score.lower, p.score.upper);
  const int whole = (band.full_end - band.full_begin) / C::kBlockS;
  const int masked = band.count - whole;
  const int late = masked - (band.full_begin - band.begin) / C::kBlockS;
  return {band.begin, band.full_begin, band.full_end, band.count, masked, late};
}

// What a block is told about its next tile of queries.
struct Work {
  BlockTile tile;
  KeyWalk walk;
};

// The producer writes a Work when it has waited for the place of the last q. So with two places
// everybody has released q of three rounds ago, may still be storing its out, and no older one.
constexpr unsigned kWorkSlots = 4;

// Where the n-th tile of a ring is, and the parity of the phase of a barrier there that it is the
// n-th of. Tiles of keys are counted through all tiles of queries of the block.
template <int kStages>
struct Stage {
  static_assert((kStages & (kStages - 1)) == 0, "n may wrap around");

  int index;
  uint32_t parity;

  __device__ __forceinline__ explicit Stage(unsigned n)
      : index(static_cast<int>(n % kStages)), parity(n / kStages % 2) {}
};

// One arrival for the whole warp: what its lanes and, behind a wgmma_wait, its products have read
// may be overwritten. Without __syncwarp the general kernels also move descriptors to uniform
// registers anew for every product: the compiler doesn't see that the warp is together.
__device__ __forceinline__ void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

template <int kQueries, int kStages>
struct TileBarriers {
  uint64_t q_full[kQueries], q_empty[kQueries];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];

  // One thread, before __syncthreads.
  __device__ __forceinline__ void init(int warps, int q_releases) {
    for (int place = 0; place < kQueries; ++place) {
      ptx::mbarrier_init(&q_full[place], 1);
      ptx::mbarrier_init(&q_empty[place], q_releases);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&k_full[stage], 1);
      ptx::mbarrier_init(&v_full[stage], 1);
      ptx::mbarrier_init(&k_empty[stage], warps);
      ptx::mbarrier_init(&v_empty[stage], warps);
    }
    ptx::fence_mbarrier_init();
  }
};

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kTurn = 1,       // + group: it is this group's turn to issue its products
  kGroupDone = 4,  // + group: all of it have come here
};

template <int kHeadDim, bool kGeneralScores>
struct HopperConfig {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kGeneralScores;
  static constexpr HopperTuning kTuning = attention_forward_tuning_sm90(kD, kGeneral);
  static constexpr int kGroups = kTuning.groups;
  static constexpr int kStages = kTuning.stages;
  static constexpr int kQueries = kTuning.queries;
  static constexpr bool kOwnOut = kTuning.own_out();
  static constexpr int kThreads = kTuning.threads();
  static constexpr int kProducerRegisters = kTuning.producer_registers();
  static constexpr int kConsumerRegisters = kTuning.consumer_registers();
  static constexpr bool kTurns = !kGeneral;
  static constexpr int kConsumers = kGroups * kGroupThreads;
  static constexpr int kBlockT = kTuning.block_t();
  static constexpr int kBlockS = kTuning.block_s;
  static constexpr int kM = 1;
  static constexpr int kScores = kBlockS / kMmaColumns;
  static constexpr int kSums = kD / kMmaColumns;

  using Queries = SlabTile<kBlockT, kD>;
  using Keys = SlabTile<kBlockS, kD>;
  struct NoOut {};

  struct SharedStorage {
    Queries q[kQueries];  // without out: its place too, each group in its own rows
    Keys k[kStages];
    Keys v[kStages];
    std::conditional_t<kOwnOut, Queries, NoOut> out;
    float pinned[kConsumers];
    Work work[kWorkSlots];  // of rounds 0, 1, ..: written before q_full
    TileBarriers<kQueries, kStages> barriers;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  static __device__ __forceinline__ Queries& out_tile(SharedStorage& smem) {
    if constexpr (kOwnOut) {
      return smem.out;
    } else {
      return smem.q[0];
    }
  }
};

}  // namespace attention_fwd
}  // namespace fused_lm
