// What Hopper's matrix product is made of: a Config, shared memory, the way through the tiles. The
// story is in gemm_sm90.h.
#pragma once

#include <type_traits>

#include "common/slab_tile.h"
#include "common/vec.h"
#include "common/warp.h"
#include "kernels/gemm_order.h"
#include "kernels/gemm_tuning_sm90.h"
#include "ptx/tensor_map.h"
#include "ptx/wgmma.h"

namespace fused_lm {
namespace gemm {

constexpr int kGroups = 2;  // of consumers
constexpr int kGroupThreads = 128;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kProductRows = 64;  // of a wgmma
constexpr int kFragment = 4;      // sums of 8 columns that a thread holds, ptx/mma.h
constexpr int kFragmentColumns = 8;
constexpr int kSlabColumns = 64;
constexpr int kSlabFragments = kSlabColumns / kFragmentColumns;
constexpr int kSlabBlocks = kSlabColumns / 16;  // of 16 columns, what an stmatrix stores

template <class ElementType, GemmSchedule kSchedule, Layout kLayout,
          int kClusterBlocks = gemm_tuning_of(kSchedule).cluster>
struct Config {
  using Element = ElementType;
  static constexpr GemmTuning kTuning = gemm_tuning_of(kSchedule);
  static constexpr int kBlockN = kTuning.block_n;
  static constexpr int kStages = kTuning.stages;
  static constexpr bool kPingPong = kTuning.ping_pong;
  static constexpr int kCluster = kClusterBlocks;
  // Whether b is brought as two halves, which need not follow one another: of a gated layer one
  // gets its gates and the other their values.
  static constexpr bool kHalves = kSchedule == GemmSchedule::kCooperative256;
  static constexpr bool kTurnedA = kLayout == Layout::kBothTurned;
  static constexpr bool kTurnedB = kLayout != Layout::kNoneTurned;
  // Of b's rows in shared memory, a box each.
  static constexpr int kShares = kCluster == 2 || (kHalves && !kTurnedB) ? 2 : 1;
  static constexpr int kRows = kPingPong ? kGemmBlockM : kGemmBlockM / kGroups;  // of a consumer
  static constexpr int kM = kRows / kProductRows;
  static constexpr int kN = kBlockN / kFragmentColumns;
  static constexpr int kSlabs = kBlockN / kSlabColumns;
  static constexpr int kSteps = kGemmBlockK / kProductDepth;
  // Whether the epilogue reads a tile too, which comes into the slabs that results leave by.
  static constexpr bool kLoads = kSchedule == GemmSchedule::kPingPong192Loads;
  static constexpr int kPlaces = kLoads ? kSlabs : 2;  // for a group's slabs
  static constexpr int kReleases = kCluster * (kPingPong ? 1 : kGroups) * kGroupThreads / kWarpSize;
  static_assert(kCluster == 1 || (kCluster == 2 && !kLoads));

  template <bool kTurned, int kOperandRows>
  using Operand = std::conditional_t<kTurned, SlabTile<kGemmBlockK, kOperandRows>,
                                     SlabTile<kOperandRows, kGemmBlockK>>;
  using A = Operand<kTurnedA, kGemmBlockM>;
  using B = Operand<kTurnedB, kBlockN>;
  using Slab = SlabTile<kRows, kSlabColumns>;

  struct Stage {
    A a;
    B b;
  };
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
    uint64_t source_full[kGroups][kSlabs], source_empty[kSlabs];
  };
  static_assert(!kLoads || kSlabs >= kGroups);
  struct NoSums {};
  struct ColumnSums {
    float warp[kGroups][kSlabs][kGroupThreads / kWarpSize][kSlabColumns];
  };
  struct SharedStorage {
    Stage stages[kStages];
    Slab slabs[kGroups][kPlaces];
    std::conditional_t<kLoads, ColumnSums, NoSums> sums;
    Barriers barriers;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kTurn = 1,         // + group: its products may begin
  kSlabWritten = 3,  // + group
};

// The sums of a consumer, and a slab of them in 16 bits: [16 rows, 16 columns] per four words.
template <class C>
using Sums = float[C::kM][C::kN][kFragment];
template <class C>
using Packed = uint32_t[C::kM][kSlabBlocks][4];

// How the steps of K of shared tiles are dealt out: each block has so many, the first ones one
// more.
struct Shares {
  int steps, longer;
};

// What the kernels are told.
struct Arguments {
  ptx::TensorMap a, b, pre, out;  // pre: stored, or loaded as the source of an activation's slope
  ptx::TensorMap pre_values, out_values;  // gated: what lies behind the gates
  int M, N, K;
  int tiles_m, tiles_n, group;
  int tile_columns;  // of the layer: half of a gated tile's
  int next_half;     // from the rows of b in a tile's first half to those in the second
  int cluster;       // rows of tiles that are numbered in turn
  int whole;         // tiles that a block each makes; those behind them are shared
  Shares shares;
  GemmLayer layer;
  float* parts;
};

// By a shuffle the compiler learns that a warp's lanes agree, and keeps descriptors once per warp.
__device__ __forceinline__ int own_warpgroup() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
}

// The blocks of a cluster have neighbours in number, one below the other.
__device__ __forceinline__ TileAt tile_at(const Arguments& args, int tile) {
  const int cluster = args.cluster, rows = (args.tiles_m + cluster - 1) / cluster;
  const TileIndex index = tile_in_groups(tile / cluster, rows, args.tiles_n, args.group / cluster);
  return {(index.m * cluster + tile % cluster) * kGemmBlockM, index.n * args.tile_columns};
}

__device__ __forceinline__ int k_tile_count(const Arguments& args) {
  return (args.K + kGemmBlockK - 1) / kGemmBlockK;
}

// The stage that comes next, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1u;
  }
  // Past stages that the other consumer has.
  __device__ __forceinline__ void skip(int count) {
    stage += count;
    parity ^= stage / kStages % 2;
    stage %= kStages;
  }
  __device__ __forceinline__ int previous() const { return (stage == 0 ? kStages : stage) - 1; }
};

}  // namespace gemm
}  // namespace fused_lm
