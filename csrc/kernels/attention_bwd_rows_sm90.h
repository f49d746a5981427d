// Before and after Hopper's attention backward, a block per tile of queries.
//
// attention_bwd_prepare: of every row lse, +inf where it saw no key, in units of log2 for the plain
// kernels unless one of the tile is huge; and delta = rowsum(dout * out) - dlse. Rows behind the
// last get +inf and 0: P and ds are 0 there. It also makes the sums of dq zeros. Bytes per row: 4
// Dv + 4 (+ 4) read, 8 + 4 kD per slot of sums written.
//
// attention_bwd_finish: dq = scale times its sums, slot after slot. They lie as the consumers hold
// them: for each group and every 8 of its queries one fragment of ptx/mma.h per thread. So they are
// added 512 bytes per warp at a time, and turned here, through shared memory. Bytes per row: 4 kD
// per slot read, 2 D written.
#pragma once

#include "common/vec.h"
#include "common/warp.h"
#include "kernels/attention_bwd_wide_tiles_sm90.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace attention_bwd {

constexpr int kRowsThreads = 256;
constexpr int kRowLanes = 8;  // for each row of out and dout
// From here on lse in units of log2 would be off by more than 2^-14.
constexpr float kHugeLse = 700.0f;

// What both are told.
struct RowsParams {
  AttentionBackwardParams p;
  HopperBackwardRoom room;
};

template <int kHeadDim, bool kGeneral, bool kLong = false>
using BackwardConfig =
    std::conditional_t<(kHeadDim > kWideBackwardDim), WideConfig<kHeadDim, kGeneral>,
                       HopperConfig<kHeadDim, kGeneral, kLong>>;

// Of all batches and heads.
template <class C>
__device__ __forceinline__ int64_t tile_index(const AttentionShape& shape, const BlockTile& block) {
  const int tiles = (shape.T + C::kBlockT - 1) / C::kBlockT;
  return (static_cast<int64_t>(block.batch) * shape.H + block.head) * tiles + block.tile;
}

// Floats from a slot of sums to the next.
template <class C>
__device__ __forceinline__ int64_t slot_floats(const AttentionShape& shape) {
  const int tiles = (shape.T + C::kBlockT - 1) / C::kBlockT;
  return static_cast<int64_t>(shape.B) * shape.H * tiles * C::kTileFloats;
}

// rowsum(dout * out) of query t, in all lanes of a row; 0 behind the last.
template <class Element>
__device__ __forceinline__ float row_delta(const AttentionBackwardParams& p, const BlockTile& block,
                                           int t) {
  constexpr DType kDType = kDTypeOf<Element>;
  const uint16_t* gOut =
      p.out + head_offset(p.out_strides, block.batch, block.head) + t * p.out_strides.row;
  const uint16_t* gDout =
      p.dout + head_offset(p.dout_strides, block.batch, block.head) + t * p.dout_strides.row;
  float sum[1] = {};
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  for (int chunk = lane; t < p.shape.T && chunk * kChunkElements < p.shape.Dv; chunk += kRowLanes) {
    RawVector<8> rOut, rDout;
    load_raw<2, LoadPolicy::kStreaming>(
        rOut, reinterpret_cast<const char*>(gOut + chunk * kChunkElements));
    load_raw<2, LoadPolicy::kCached>(rDout,
                                     reinterpret_cast<const char*>(gDout + chunk * kChunkElements));
    float out[8], dout[8];
    widen<kDType>(out, rOut);
    widen<kDType>(dout, rDout);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[0] = fmaf(out[e], dout[e], sum[0]);
  }
  lanes_sum(sum, kRowLanes);
  return sum[0];
}

// lse of query t; +inf where it saw no key, and behind the last.
__device__ __forceinline__ float row_lse(const AttentionBackwardParams& p, const BlockTile& block,
                                         int t) {
  if (t >= p.shape.T) return INFINITY;
  const int64_t head = static_cast<int64_t>(block.batch) * p.shape.H + block.head;
  const float lse = p.lse[head * p.shape.T + t];
  return lse == kNoScore ? INFINITY : lse;
}

// Of the queries of `block` that p has; `tile` is where their numbers and sums are.
template <class Element, class C>
__device__ __forceinline__ void prepare_tile(const AttentionBackwardParams& p,
                                             const HopperBackwardRoom& room, const BlockTile& block,
                                             int64_t tile) {
  float* gSlot = room.dq_sums + tile * C::kTileFloats;
  int slot = 0;
  do {
    auto* gSums = reinterpret_cast<uint4*>(gSlot);
    for (int i = static_cast<int>(threadIdx.x); i < C::kTileFloats / 4; i += kRowsThreads) {
      constexpr uint4 kZeros = {0, 0, 0, 0};
      gSums[i] = kZeros;
    }
    gSlot += slot_floats<C>(p.shape);
  } while (++slot < room.slots);
  constexpr int kRowsAtOnce = kRowsThreads / kRowLanes;
  constexpr int kRounds = (C::kBlockT + kRowsAtOnce - 1) / kRowsAtOnce;
  const int first = static_cast<int>(threadIdx.x) / kRowLanes;
  float lse[kRounds], delta[kRounds];
  bool huge = false;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = first + i * kRowsAtOnce;
    // Behind the tile as behind the last query.
    const int t = row < C::kBlockT ? block.tile * C::kBlockT + row : p.shape.T;
    delta[i] = row_delta<Element>(p, block, t);
    lse[i] = row_lse(p, block, t);
    huge |= fabsf(lse[i]) > kHugeLse && lse[i] != INFINITY;
    if (t < p.shape.T && p.dlse != nullptr) {
      const HeadStrides& strides = p.dlse_strides;
      delta[i] -= p.dlse[head_offset(strides, block.batch, block.head) + t * strides.row];
    }
  }
  const bool any_huge = __syncthreads_or(huge) != 0;
  if (threadIdx.x % kRowLanes != 0) return;
  float* gNumbers = room.numbers + tile * (C::kLseFloats + C::kBlockT);
  const float unit = C::kGeneral || any_huge ? 1.0f : kLog2E;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = first + i * kRowsAtOnce;
    if (row >= C::kBlockT) break;
    gNumbers[row] = lse[i] * unit;
    gNumbers[C::kLseFloats + row] = delta[i];
  }
  if (first < kHugeFloats) gNumbers[C::kBlockT + first] = any_huge ? 1.0f : 0.0f;
}

template <class Element, int kHeadDim, bool kGeneral, bool kLong>
__global__ void __launch_bounds__(kRowsThreads)
    attention_bwd_prepare(const RowsParams rows, int batch_first) {
  using C = BackwardConfig<kHeadDim, kGeneral, kLong>;
  const BlockTile block = block_tile(false, batch_first);
  prepare_tile<Element, C>(rows.p, rows.room, block, tile_index<C>(rows.p.shape, block));
}

// Rows of dq in shared memory: 16 bytes more than they have, so that the fragments of a warp fall
// into different banks.
template <class C>
struct DqRows {
  static constexpr int kPitch = C::kD + kChunkElements;
  alignas(16) uint16_t rows[C::kBlockT][kPitch];
};

// Fragment i of a thread of a group, two rows of it, to where it belongs.
template <class C>
__device__ __forceinline__ void put_fragment(DqRows<C>& smem, uint32_t upper, uint32_t lower,
                                             int group, int thread, int i) {
  const FragmentLane at = fragment_lane(thread % kWarpSize);
  const int row = thread / kWarpSize * kMmaRows + at.row, column = i * kMmaColumns + at.column;
  if constexpr (C::kDqTransposed) {
    const int query = C::dq_query(group) + column, dim = C::dq_column(group) + row;
    smem.rows[query][dim] = static_cast<uint16_t>(upper);
    smem.rows[query + 1][dim] = static_cast<uint16_t>(upper >> 16);
    smem.rows[query][dim + 8] = static_cast<uint16_t>(lower);
    smem.rows[query + 1][dim + 8] = static_cast<uint16_t>(lower >> 16);
  } else {
    const int query = C::dq_query(group) + row, dim = C::dq_column(group) + column;
    *reinterpret_cast<uint32_t*>(&smem.rows[query][dim]) = upper;
    *reinterpret_cast<uint32_t*>(&smem.rows[query + 8][dim]) = lower;
  }
}

// Fragments first .. of a thread, summed over the slots in their order. Of a slot all are on their
// way at once.
template <class C, int kCount>
__device__ __forceinline__ void add_slots(float4 (&sums)[kCount], const AttentionShape& shape,
                                          int slots, const float* gFirst) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = *reinterpret_cast<const float4*>(gFirst + i * C::kFragmentStride);
  }
#pragma unroll 1
  for (int slot = 1; slot < slots; ++slot) {
    gFirst += slot_floats<C>(shape);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 more = *reinterpret_cast<const float4*>(gFirst + i * C::kFragmentStride);
      sums[i].x += more.x, sums[i].y += more.y;
      sums[i].z += more.z, sums[i].w += more.w;
    }
  }
}

// Up to 8 of kCount loads, so that all rounds are whole.
template <int kCount, int kMost = 8>
constexpr int kLoadsAtOnce = kCount % kMost == 0 ? kMost : kLoadsAtOnce<kCount, kMost - 1>;
template <int kCount>
constexpr int kLoadsAtOnce<kCount, 1> = 1;

// As prepare_tile.
template <class Element, class C>
__device__ __forceinline__ void finish_tile(DqRows<C>& smem, const AttentionBackwardParams& p,
                                            const HopperBackwardRoom& room, const BlockTile& block,
                                            int64_t tile) {
  constexpr DType kDType = kDTypeOf<Element>;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const float* gSums =
      room.dq_sums + tile * C::kTileFloats + group * C::kGroupStride + thread * kFragment;
  const float scale = p.score.scale;
  constexpr int kAtOnce = kLoadsAtOnce<C::kDq>;
  for (int first = 0; C::has_dq(group, thread) && first < C::kDq; first += kAtOnce) {
    float4 sums[kAtOnce];
    add_slots<C>(sums, p.shape, room.slots, gSums + first * C::kFragmentStride);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      put_fragment(smem, narrow_pair<kDType>(sums[i].x * scale, sums[i].y * scale),
                   narrow_pair<kDType>(sums[i].z * scale, sums[i].w * scale), group, thread,
                   first + i);
    }
  }
  __syncthreads();
  // Eight lanes read at once, and rows are read whole: over the end of one they'd meet in banks.
  constexpr int kChunks = (C::kD + 63) / 64 * 8;
  uint16_t* gHead = p.dq + head_offset(p.dq_strides, block.batch, block.head);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < C::kBlockT * kChunks; i += kRowsThreads) {
    const int row = i / kChunks, first = i % kChunks * kChunkElements;
    const int t = block.tile * C::kBlockT + row;
    if (first >= C::kD) continue;
    const uint4 chunk = *reinterpret_cast<const uint4*>(&smem.rows[row][first]);
    if (t >= p.shape.T || first >= p.shape.D) continue;
    *reinterpret_cast<uint4*>(gHead + t * p.dq_strides.row + first) = chunk;
  }
}

template <class Element, int kHeadDim, bool kGeneral, bool kLong>
__global__ void __launch_bounds__(kRowsThreads)
    attention_bwd_finish(const RowsParams rows, int batch_first) {
  using C = BackwardConfig<kHeadDim, kGeneral, kLong>;
  auto& smem = dynamic_smem<DqRows<C>>();
  const BlockTile block = block_tile(false, batch_first);
  finish_tile<Element, C>(smem, rows.p, rows.room, block, tile_index<C>(rows.p.shape, block));
}

}  // namespace attention_bwd
}  // namespace fused_lm
