// Sizes, shared memory and barriers of Hopper's attention backward above 128 columns. The story is
// in attention_bwd_wide_sm90.h.
#pragma once

#include "kernels/attention_bwd_tiles_sm90.h"

namespace fused_lm {
namespace attention_bwd {

constexpr int kGroupQueries = 64;  // whose P, ds and dq a group makes

// A tile whose columns are two halves, a SlabTile each: 192 columns are no two halves of slabs of
// 64.
template <int kTileRows, int kTileColumns>
struct HalvedTile {
  using Half = SlabTile<kTileRows, kTileColumns / 2>;
  static constexpr int kColumns = kTileColumns;
  static constexpr Swizzle kSwizzle = Half::kSwizzle;
  static constexpr int kSlabColumns = Half::kSlabColumns;
  static constexpr int kHalfSteps = Half::kColumns / kProductDepth;
  static constexpr int kHalfChunks = Half::kColumns / 8;
  static constexpr uint32_t kBytes = 2 * Half::kBytes;

  Half halves[2];

  __device__ __forceinline__ uint4* at(int row, int chunk) {
    return halves[chunk / kHalfChunks].at(row, chunk % kHalfChunks);
  }
  __device__ __forceinline__ uint64_t k_major(int row) const { return halves[0].k_major(row); }
  static __device__ __forceinline__ constexpr uint32_t k_step(int step) {
    return step / kHalfSteps * Half::kBytes + Half::k_step(step % kHalfSteps);
  }
};

template <int kHeadDim, bool kGeneralScores>
struct WideConfig {
  static constexpr int kD = kHeadDim;
  static constexpr bool kGeneral = kGeneralScores;
  static constexpr bool kHasBand = true;
  static constexpr HopperBackwardTuning kTuning = attention_backward_tuning_sm90(kD, kGeneral);
  static constexpr int kBlockT = kTuning.block_t;
  static constexpr int kBlockS = hopper_backward_keys(kD);
  static constexpr int kQueryStages = kD <= 192 ? 2 : 1;  // what shared memory has room for
  static constexpr int kDoutStages = 1;  // one: so the next one's arrival frees P and ds
  static constexpr bool kQueriesFirst = true;
  static constexpr bool kBulkAdds = false;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr int kHalf = kD / 2;  // columns
  static constexpr int kM = 1;
  static constexpr int kScores = kBlockS / kMmaColumns;
  static constexpr int kSums = kHalf / kMmaColumns;
  static constexpr int kLseFloats = kBlockT + kHugeFloats;
  static_assert(kBlockT == kGroups * kGroupQueries && kBlockS == kGroupKeys && kD % 64 == 0);
  static_assert(kTuning.adds == GradientAdds::kRegisters);

  // Sums of dq: a group's queries, and of them the fragments of all columns one after the other.
  static constexpr bool kDqTransposed = false;
  static constexpr int kDq = kD / kMmaColumns;
  static constexpr int kTileFloats = kBlockT * kD;
  static constexpr int kGroupStride = kGroupQueries * kD;
  static constexpr int kFragmentStride = kGroupThreads * kFragment;
  static __device__ __forceinline__ constexpr int dq_query(int group) {
    return group * kGroupQueries;
  }
  static __device__ __forceinline__ constexpr int dq_column(int) { return 0; }
  static __device__ __forceinline__ constexpr bool has_dq(int, int) { return true; }

  using Keys = HalvedTile<kBlockS, kD>;
  using Queries = HalvedTile<kBlockT, kD>;
  using Weights = SlabTile<kBlockT, kBlockS>;  // P or ds [queries, keys]

  struct Barriers {
    uint64_t k_full, v_full;
    uint64_t q_full[kQueryStages], q_empty[kQueryStages];
    uint64_t dout_full[kDoutStages], dout_empty[kDoutStages];
  };
  // PackedPart: what kernels of packed sequences have beside, or nothing.
  template <class PackedPart>
  struct Storage {
    Keys k;  // at the end: dk
    Keys v;  // at the end: dv
    Queries q[kQueryStages];
    Queries dout[kDoutStages];
    Weights probs, ds;
    alignas(16) float lse[kQueryStages][kLseFloats];
    alignas(16) float delta[kDoutStages][kBlockT];
    float pinned[kConsumers];
    Barriers barriers;
    PackedPart packed;
  };
  using SharedStorage = Storage<Nothing>;
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  static constexpr bool kPacked = false;
  using Params = HopperBackwardParams;
  static __device__ __forceinline__ const AttentionBackwardParams& params(const Params& told,
                                                                          const SharedStorage&) {
    return told.p;
  }
  static __device__ __forceinline__ int heads(const Params& told) { return told.p.shape.H; }
};

// Named barriers of all consumers; 0 is __syncthreads.
enum WideBarrier : int {
  kWeightsWritten = 1,  // P and ds of a tile
  kTilesRead = 2,       // k and v, by the last products
  kRowsStaged = 3,      // dk and dv lie where k and v did
};

}  // namespace attention_bwd
}  // namespace fused_lm
