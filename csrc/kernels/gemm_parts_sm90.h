// Hopper's matrix product where tiles don't come out even: the sums of some tiles are shared by all
// blocks ("stream-K"), and a second kernel adds what each has made.
//
// 72 tiles are 72 blocks' work, and 60 multiprocessors of 132 stand idle. So the steps of K of all
// shared tiles, tile after tile, are dealt out: every block has as many of them, give or take one,
// one after the other. Of a tile it has all, the end or the beginning, or something in between: a
// part.
//
//   tile 0            | tile 1            | tile 2
//   block 0     | block 1     | block 2     | block 3
//
// gemm_parts_sm90 leaves each part's sums in a slot of its own, as rows of 256 fp32: slot tile +
// block, which no two parts have in common, since the next part has another tile, another block, or
// both. gemm_add_parts adds a tile's slots in the order of K, and does what the epilogue would have
// done. Nobody waits for another block and nothing is added atomically, so results repeat. They
// depend on how many blocks there are: another GPU adds in another order.
//
// Grid of the second: a block per 64 columns of a tile's results; each thread has 8 columns of 4
// rows, of a gated tile in both of its halves.
//
// Bytes: operands as in gemm_sm90.h; 4 M N per part of a tile written, and read.
//
// Source: Osama et al. 2023 (arXiv:2301.03598), whose blocks add to one another's tiles instead.
#pragma once

#include "kernels/gemm_epilogue_sm90.h"
#include "kernels/gemm_finish.h"
#include "kernels/gemm_producer_sm90.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace gemm {

constexpr GemmSchedule kPartSchedule = GemmSchedule::kCooperative256;
constexpr int kJoinThreads = 256;
constexpr int kRowThreads = kSlabColumns / kFinishColumns;
constexpr int kRowsAtOnce = kJoinThreads / kRowThreads;
constexpr int kJoinRows = kGemmBlockM / kRowsAtOnce;  // of a thread

template <class Element, Layout kLayout>
using PartConfig = Config<Element, kPartSchedule, kLayout, 1>;

// The first step of K, counted over all shared tiles, that a block has.
__device__ __forceinline__ int share_begin(const Shares& shares, int block) {
  return block * shares.steps + min(block, shares.longer);
}

// The block that has a step.
__device__ __forceinline__ int owner_of(const Shares& shares, int step) {
  const int in_longer = shares.longer * (shares.steps + 1);
  return step < in_longer ? step / (shares.steps + 1)
                          : shares.longer + (step - in_longer) / shares.steps;
}

// Calls body(shared tile, its first step of K, how many) for every part of a block.
template <class Body>
__device__ __forceinline__ void for_each_part(const Arguments& args, const Body& body) {
  const int k_tiles = k_tile_count(args), block = static_cast<int>(blockIdx.x);
  const int begin = share_begin(args.shares, block);
  int rest = share_begin(args.shares, block + 1) - begin;
  int tile = begin / k_tiles, first = begin % k_tiles;
#pragma unroll 1
  do {
    const int steps = min(k_tiles - first, rest);
    body(tile, first, steps);
    rest -= steps;
    first = 0;
    ++tile;
  } while (rest > 0);
}

template <class C>
__device__ __forceinline__ float* slot_of(const Arguments& args, int tile, int block) {
  return args.parts + int64_t{tile + block} * (kGemmBlockM * C::kBlockN);
}

// A consumer's sums to its rows of a slot, but what lies outside of the matrix. Four lanes fill a
// sector of 32 bytes.
template <class C>
__device__ __forceinline__ void store_part(const Consumer<C>& own, const Sums<C>& sums,
                                           float* gSlot, const TileAt& at) {
  const int thread = Consumer<C>::thread(), lane = thread % kWarpSize;
  const int own_row = own.first_row() + thread / kWarpSize * 16 + lane / 4;
  const int own_column = lane % 4 * 2;
  float* gOwn = gSlot + own_row * C::kBlockN + own_column;
  for_each_pair<C>(own.args, sums, at.row + own_row, at.column + own_column,
                   [&](int down, int n, const float* pair) {
                     const uint2 words = {__float_as_uint(pair[0]), __float_as_uint(pair[1])};
                     *reinterpret_cast<uint2*>(gOwn + down * C::kBlockN + n * kFragmentColumns) =
                         words;
                   });
}

template <class C>
__device__ __forceinline__ void produce_parts(typename C::SharedStorage& smem,
                                              const Arguments& args) {
  Ring<C::kStages> ring;
  for_each_part(args, [&](int tile, int first, int steps) {
    const TileAt at = tile_at(args, args.whole + tile);
    load_steps<C>(smem, args, ring, at, first * kGemmBlockK, (first + steps) * kGemmBlockK);
  });
}

template <class C>
__device__ __forceinline__ void consume_parts(typename C::SharedStorage& smem,
                                              const Arguments& args, int group) {
  Consumer<C> own(smem, args, group);
  const uint64_t a = own.left(), b = own.right();
  for_each_part(args, [&](int tile, int, int steps) {
    Sums<C> sums;
    own.multiply(sums, a, b, steps, [] {});
    store_part<C>(own, sums, slot_of<C>(args, tile, static_cast<int>(blockIdx.x)),
                  tile_at(args, args.whole + tile));
  });
}

template <class Element, Layout kLayout>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_parts_sm90(const __grid_constant__ Arguments args) {
  using C = PartConfig<Element, kLayout>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const int warpgroup = own_warpgroup();
  start_block<C>(smem, args);
  if (warpgroup == 0) {
    ptx::registers_decrease<24>();
    if (threadIdx.x == 0) produce_parts<C>(smem, args);
  } else {
    ptx::registers_increase<240>();
    consume_parts<C>(smem, args, warpgroup - 1);
  }
}

struct JoinSums {
  alignas(16) float row[kRowsAtOnce][kSlabColumns];
};

// A thread's 8 columns of its rows below `row`, summed over the parts of a tile: as one of what the
// finish reads, each half of a gated tile being one.
template <class C, int kPart, int kParts>
__device__ __forceinline__ void add_slots(FinishSums (&value)[kJoinRows][kParts],
                                          const Arguments& args, int tile, int row, int own_row,
                                          int own_column) {
  const int k_tiles = k_tile_count(args), first_step = tile * k_tiles;
  const int first = owner_of(args.shares, first_step);
  const int last = owner_of(args.shares, first_step + k_tiles - 1);
  const int own = own_row * C::kBlockN + own_column + kPart * (C::kBlockN / 2);
#pragma unroll 1
  for (int block = first; block <= last; ++block) {
    const float* gOwn = slot_of<C>(args, tile, block) + own;
    FinishSums part[kJoinRows] = {};
#pragma unroll
    for (int i = 0; i < kJoinRows; ++i) {
      if (row + i * kRowsAtOnce >= args.M) break;
      load_floats<kFinishColumns>(part[i], gOwn, i * kRowsAtOnce * C::kBlockN);
    }
#pragma unroll
    for (int i = 0; i < kJoinRows; ++i) {
#pragma unroll
      for (int e = 0; e < kFinishColumns; ++e) value[i][kPart][e] += part[i][e];
    }
  }
}

// Sums over the rows of a tile, in the order of the threads' rows.
template <int kSums>
__device__ __forceinline__ void store_column_sums(JoinSums& smem, const Arguments& args,
                                                  const FinishSums (&sums)[kSums], int thread,
                                                  const TileAt& strip) {
  const int column = strip.column + thread;
#pragma unroll
  for (int part = 0; part < kSums; ++part) {
    if (part > 0) __syncthreads();
    store_floats<kFinishColumns>(smem.row[thread / kRowThreads],
                                 thread % kRowThreads * kFinishColumns, sums[part]);
    __syncthreads();
    if (thread >= kSlabColumns || column >= args.N) continue;
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) all += smem.row[i][thread];
    const int64_t line = int64_t{strip.row / kGemmBlockM} * kSums + part;
    args.layer.partial[line * args.N + column] = all;
  }
}

template <class Element, template <DType> class FinishOf>
__global__ void __launch_bounds__(kJoinThreads)
    gemm_add_parts(const __grid_constant__ Arguments args) {
  using C = PartConfig<Element, Layout::kNoneTurned>;
  using Finish = FinishOf<kDTypeOf<Element>>;
  constexpr int kStrips = C::kSlabs / Finish::kReads;
  constexpr int kSums = Finish::kSums > 0 ? Finish::kSums : 1;
  const int tile = static_cast<int>(blockIdx.x) / kStrips;
  const int slab_column = static_cast<int>(blockIdx.x) % kStrips * kSlabColumns;
  const TileAt at = tile_at(args, args.whole + tile);
  const TileAt strip = {at.row, at.column + slab_column};
  if (strip.column >= args.N) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int own_row = thread / kRowThreads, own_column = thread % kRowThreads * kFinishColumns;
  const int row = strip.row + own_row, column = strip.column + own_column;
  FinishSums sums[kSums] = {};
  if (column < args.N) {
    FinishParts<Finish> value[kJoinRows] = {};
    add_slots<C, 0>(value, args, tile, row, own_row, slab_column + own_column);
    if constexpr (Finish::kReads == 2) {
      add_slots<C, 1>(value, args, tile, row, own_row, slab_column + own_column);
    }
#pragma unroll
    for (int i = 0; i < kJoinRows; ++i) {
      const int own = row + i * kRowsAtOnce;
      if (own >= args.M) break;
      Finish::row(args.layer, value[i], own, column, args.N);
#pragma unroll
      for (int part = 0; part < kSums; ++part) {
#pragma unroll
        for (int e = 0; e < kFinishColumns; ++e) sums[part][e] += value[i][part][e];
      }
    }
  }
  if constexpr (Finish::kSums > 0) {
    if (args.layer.partial == nullptr) return;
    store_column_sums(dynamic_smem<JoinSums>(), args, sums, thread, strip);
  }
}

}  // namespace gemm
}  // namespace fused_lm
