// Matrix product for every GPU since Ampere whose end is a layer: out = finish(a b^T), by cp.async
// and mma.sync.
//
// Grid: a block per tile [128, 128], four warps of [64, 64]. Steps of 32 of K come into three
// stages, two ahead of the one that is multiplied:
//
//   wait for step k | barrier | copy step k + 2 | products of step k
//
// One barrier per step says that the copies of all threads have landed, and that nobody reads the
// stage any more which the next copies go to.
//
// An operand is kept as two halves, each of 64 of its rows: what a warp multiplies. It may lie in
// memory either way, see gemm_sm90.h: of a turned one a half is [32, 64] instead of [64, 32], and
// ldmatrix turns what it reads. So there is no transposing kernel here either.
//
// A lane holds two adjacent sums of a row. For what follows it should be eight, 16 bytes of
// results: each warp turns 16 rows at a time through shared memory of its own, where the stages
// were, and gemm_finish.h does with them what the layer asks for. Sums over the rows of a tile meet
// in shared memory in a fixed order.
//
// Of a gated layer the left half of a tile is gates and the right half their values, 64 columns of
// each. Warps side by side then turn rows for each other, and each has half of them.
//
// Bytes: 2 (M K tiles_n + N K tiles_m), mostly from the L2; per element of the output 2 for each
// result, and what the finish reads. FLOPs: 2 M N K, rounded up to whole tiles. What binds, per
// multiprocessor of an A100: 512 clocks of the tensor cores per step of a tile; shared memory gives
// 32 KB to ldmatrix and takes 16 KB of copies, 384 clocks.
//
// Sources: PTX 9.7.14, warp level matrix instructions.
#pragma once

#include "common/shared_tile.h"
#include "common/warp.h"
#include "kernels/gemm_finish.h"
#include "kernels/gemm_tuning_sm80.h"
#include "ptx/launch.h"
#include "ptx/mma.h"

namespace fused_lm {
namespace gemm {

constexpr int kPortableThreads = 128;

template <class ElementType, Layout kLayout, bool kIsGated>
struct PortableConfig {
  using Element = ElementType;
  static constexpr bool kGated = kIsGated;
  static constexpr DType kDType = kDTypeOf<Element>;
  static constexpr GemmTuningSm80 kTuning = kGemmTuningSm80;
  static constexpr int kStages = kTuning.stages;
  static constexpr int kBlockK = kTuning.block_k;
  static constexpr int kHalf = 64;  // rows, or columns, of a warp
  static constexpr int kBlockN = 2 * kHalf;
  static constexpr int kColumns = kGated ? kHalf : kBlockN;  // of the layer
  static constexpr int kThreads = kPortableThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kM = kHalf / 16;
  static constexpr int kN = kHalf / 8;
  static constexpr int kSteps = kBlockK / 16;
  static constexpr bool kTurnedA = kLayout == Layout::kBothTurned;
  static constexpr bool kTurnedB = kLayout != Layout::kNoneTurned;
  static_assert(kGemmBlockM == 2 * kHalf);

  template <bool kTurned>
  using Half = std::conditional_t<kTurned, SharedTile<kBlockK, kHalf>, SharedTile<kHalf, kBlockK>>;
  struct Stage {
    Half<kTurnedA> a[2];
    Half<kTurnedB> b[2];
  };
  // A warp's 16 rows, so far apart that those of a quarter of a warp begin in different banks.
  struct Rows {
    static constexpr int kPitch = kHalf + 8;
    alignas(16) float row[16][kPitch];
  };
  struct Finishing {
    Rows warp[kWarps];
    float sums[2][2][kBlockN];  // of gates and values, of the upper warps and the lower ones
  };
  union SharedStorage {
    Stage stages[kStages];
    Finishing finishing;
  };
  static_assert(sizeof(SharedStorage) <= kDefaultSmemBytes);
};

template <class C>
using WarpSums = float[C::kM][C::kN][4];

// 64 of an operand's rows, `first` and those behind it, and a step of K from k on; zeros beside
// them.
template <class C, class Tile>
__device__ __forceinline__ void copy_half(Tile& sTile, const GemmOperand& operand, int rows, int K,
                                          int first, int k) {
  if constexpr (Tile::kColumns == C::kBlockK) {
    copy_rows_async<C::kThreads>(sTile, operand.data + k, operand.stride, first, rows, K - k);
  } else {
    copy_rows_async<C::kThreads>(sTile, operand.data + first, operand.stride, k, K, rows - first);
  }
}

template <class C>
__device__ __forceinline__ void copy_step(typename C::Stage& stage, const GemmParams& p,
                                          const TileAt& at, int k) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    copy_half<C>(stage.a[half], p.a, p.M, p.K, at.row + half * C::kHalf, k);
    const int from = C::kGated ? half * p.N : 0, column = C::kGated ? 0 : half * C::kHalf;
    copy_half<C>(stage.b[half], p.b, from + p.N, p.K, from + at.column + column, k);
  }
}

// Rows 16 m .. and 16 of K as a left operand.
template <class C, class Tile>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], Tile& sTile, int lane, int m,
                                          int step) {
  if constexpr (C::kTurnedA) {
    ptx::ldmatrix_x4_trans(a, &sTile,
                           Tile::lane_off(lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2),
                           Tile::fixed_off(16 * step, 2 * m));
  } else {
    load_a(a, sTile, lane, 0, 16 * m, step);
  }
}

template <class C>
__device__ __forceinline__ void multiply_step(WarpSums<C>& sums, typename C::Stage& stage, int warp,
                                              int lane) {
  auto& sA = stage.a[warp / 2];
  auto& sB = stage.b[warp % 2];
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    uint32_t a[C::kM][4];
#pragma unroll
    for (int m = 0; m < C::kM; ++m) load_left<C>(a[m], sA, lane, m, step);
#pragma unroll
    for (int pair = 0; pair < C::kN / 2; ++pair) {
      OperandPair b;
      if constexpr (C::kTurnedB) {
        b = load_b(sB, lane, 0, 16 * step, 0, pair);
      } else {
        b = load_b_transposed(sB, lane, 0, 16 * pair, step);
      }
#pragma unroll
      for (int m = 0; m < C::kM; ++m) {
        using Element = typename C::Element;
        ptx::mma_m16n8k16(sums[m][2 * pair], a[m], b.first, Element{});
        ptx::mma_m16n8k16(sums[m][2 * pair + 1], a[m], b.second, Element{});
      }
    }
  }
}

// sums = a b^T of the warp's part of a tile.
template <class C>
__device__ __forceinline__ void multiply(WarpSums<C>& sums, typename C::SharedStorage& smem,
                                         const GemmParams& p, const TileAt& at, int warp,
                                         int lane) {
  constexpr int kAhead = C::kStages - 1;
  const int steps = (p.K + C::kBlockK - 1) / C::kBlockK;
#pragma unroll
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) copy_step<C>(smem.stages[step], p, at, step * C::kBlockK);
    ptx::cp_async_commit();
  }
  int stage = 0, next = kAhead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kAhead - 1>();
    __syncthreads();
    const int ahead = step + kAhead;
    if (ahead < steps) copy_step<C>(smem.stages[next], p, at, ahead * C::kBlockK);
    ptx::cp_async_commit();
    multiply_step<C>(sums, smem.stages[stage], warp, lane);
    if (++stage == C::kStages) stage = 0;
    if (++next == C::kStages) next = 0;
  }
}

// Sums of a lane's 8 columns over the warps' rows, in the order of lanes and warps.
template <class C, int kSums>
__device__ __forceinline__ void store_column_sums(typename C::Finishing& smem,
                                                  FinishSums (&sums)[kSums], const GemmParams& p,
                                                  const TileAt& at, int warp, int lane) {
  constexpr int kRowLanes = C::kHalf / kFinishColumns;
  const int own = warp % 2 * C::kHalf + lane * kFinishColumns;
#pragma unroll
  for (int part = 0; part < kSums; ++part) {
    strided_lanes_sum(sums[part], kRowLanes);
    if (lane < kRowLanes) {
      store_floats<kFinishColumns>(smem.sums[part][warp / 2], own, sums[part]);
    }
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), column = at.column + thread;
  if (column >= p.N) return;
#pragma unroll
  for (int part = 0; part < kSums; ++part) {
    const int64_t line = int64_t{at.row / kGemmBlockM} * kSums + part;
    p.layer.partial[line * p.N + column] = smem.sums[part][0][thread] + smem.sums[part][1][thread];
  }
}

// 16 rows of sums to the warp's memory. The two halves of 8 columns trade places in the upper 32
// columns: eight lanes that each read one half then meet all banks.
template <class C>
__device__ __forceinline__ void turn_rows(typename C::Rows& smem, const float (&sums)[C::kN][4],
                                          int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const int at = n * 8 + ((lane % 4 / 2) ^ (n / 4)) * 4 + lane % 2 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 words = {__float_as_uint(sums[n][2 * half]),
                           __float_as_uint(sums[n][2 * half + 1])};
      *reinterpret_cast<uint2*>(&smem.row[lane / 4 + 8 * half][at]) = words;
    }
  }
}

// 8 of a row's sums that turn_rows has left.
template <class C>
__device__ __forceinline__ void load_turned(FinishSums& value, const typename C::Rows& smem,
                                            int row, int chunk) {
  const int first = chunk * kFinishColumns, flip = chunk / 4 * 4;
  float low[4], high[4];
  load_floats<4>(low, smem.row[row], first + flip);
  load_floats<4>(high, smem.row[row], first + (4 ^ flip));
#pragma unroll
  for (int e = 0; e < 4; ++e) value[e] = low[e], value[4 + e] = high[e];
}

// Those who read what turn_rows writes: the warp, or where it is gated the one beside it too.
template <class C>
__device__ __forceinline__ void sync_rows() {
  if constexpr (C::kGated) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// What the layer asks for, of a warp's sums: rows and columns of a tile. Of a gated one two warps
// have the same columns, and each of them half of the rows.
template <class C, class Finish>
__device__ __forceinline__ void finish_tile(const WarpSums<C>& sums, typename C::Finishing& smem,
                                            const GemmParams& p, const TileAt& at, int warp,
                                            int lane) {
  constexpr int kRowLanes = C::kHalf / kFinishColumns, kRowsAtOnce = kWarpSize / kRowLanes;
  constexpr int kRows = C::kGated ? 8 : 16;
  constexpr int kSums = Finish::kSums > 0 ? Finish::kSums : 1;
  const int chunk = lane % kRowLanes;
  const int own_row = lane / kRowLanes + (C::kGated ? warp % 2 * kRows : 0);
  const int row = at.row + warp / 2 * C::kHalf + own_row;
  const int column = at.column + (C::kGated ? 0 : warp % 2 * C::kHalf) + chunk * kFinishColumns;
  const typename C::Rows* sRows = &smem.warp[C::kGated ? warp / 2 * 2 : warp];
  FinishSums sum[kSums] = {};
#pragma unroll
  for (int m = 0; m < C::kM; ++m) {
    turn_rows<C>(smem.warp[warp], sums[m], lane);
    sync_rows<C>();
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      FinishParts<Finish> value = {};
#pragma unroll
      for (int part = 0; part < Finish::kReads; ++part) {
        load_turned<C>(value[part], sRows[part], own_row + i, chunk);
      }
      const int own = row + 16 * m + i;
      if (own >= p.M || column >= p.N) continue;
      Finish::row(p.layer, value, own, column, p.N);
#pragma unroll
      for (int part = 0; part < kSums; ++part) {
#pragma unroll
        for (int e = 0; e < kFinishColumns; ++e) sum[part][e] += value[part][e];
      }
    }
    sync_rows<C>();
  }
  if constexpr (Finish::kSums > 0) {
    if (p.layer.partial != nullptr) store_column_sums<C>(smem, sum, p, at, warp, lane);
  }
}

template <class Element, Layout kLayout, template <DType> class FinishOf>
__global__ void __launch_bounds__(kPortableThreads, kGemmTuningSm80.blocks_per_sm)
    gemm_sm80(const __grid_constant__ GemmParams p) {
  using Finish = FinishOf<kDTypeOf<Element>>;
  using C = PortableConfig<Element, kLayout, Finish::kReads == 2>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = own_lane();
  const TileIndex tile =
      tile_in_groups(static_cast<int>(blockIdx.x), (p.M + kGemmBlockM - 1) / kGemmBlockM,
                     (p.N + C::kColumns - 1) / C::kColumns, C::kTuning.group);
  const TileAt at = {tile.m * kGemmBlockM, tile.n * C::kColumns};
  WarpSums<C> sums = {};
  multiply<C>(sums, smem, p, at, warp, lane);
  __syncthreads();
  finish_tile<C, Finish>(sums, smem.finishing, p, at, warp, lane);
}

}  // namespace gemm
}  // namespace fused_lm
