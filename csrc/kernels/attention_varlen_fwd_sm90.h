// Forward of attention inside each of several packed sequences, for Hopper: that of
// attention_fwd_sm90.h, whose walks over the keys, softmax and tiles these kernels run. What
// differs:
//
// Grid: a block per multiprocessor, which takes virtual tiles of queries. A tile belongs to one
// sequence; attention_sequences.h says which, from the bounds alone. Lengths are never read
// on the host, and no kernel before this one counts tiles. Empty ones, at most one per sequence
// and head, stay with the producer.
//
// To consumers a tile is one of an attention of one head, with T and S of its sequence. So rows and
// keys are counted from the sequence's begin, and only copies know where that is.
//
// Boxes of TMA know nothing of sequences. In a tile in which one ends lie rows of the next, which
// may be NaN:
//   keys     hidden like those behind the last key of all: a select, whatever the score is
//   values   zeros are written over them, by the warp that brings v, before consumers are told
//   queries  computed and thrown away: no row's softmax knows of another
//   out      64 rows of a sequence are a box; of fewer, each warp stores its own, 16 bytes a lane
//
// clang-format off
// Barrier          who arrives                            who waits, and what for
//   v_raw          producer of v; bytes of the tile       its warp: a tile in which a sequence ends
//   v_full         .. of other tiles; or its first lane   consumers: the tile
// clang-format on
// and the others as there.
//
// Bounds that don't rise from 0 to the rows of q or k give results without
// a meaning, and no access outside of the tensors: every one is clamped, and rows are counted.
//
// Bytes: as there, of each sequence, but whole boxes where one ends; and per virtual tile up to 32
// bounds per round of the search, and 4.
#pragma once

#include "kernels/attention_fwd_sm90.h"
#include "kernels/attention_varlen_producer_sm90.h"

namespace fused_lm {
namespace attention_varlen {

// A warp stores its rows of out, `row` .. in the tile and t .. of the sequence, as far as there are
// any. Lanes take the chunks of a slab's row, then of those below: no bank conflict.
template <class Tile>
__device__ __forceinline__ void store_ragged(const AttentionVarlenParams& p, const VarlenWork& work,
                                             Tile& sOut, int row, int t) {
  constexpr int kRowsAtOnce = kWarpSize / Tile::kSlabChunks;
  const int lane = ptx::lane_index();
  const int own = lane / Tile::kSlabChunks, chunk = lane % Tile::kSlabChunks;
  const int rows = min(work.q.length - t, kMmaRows);
  uint16_t* gOut = p.out + work.head * p.out_strides.head;
#pragma unroll 1
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int column = (slab * Tile::kSlabChunks + chunk) * kChunkElements;
    if (column >= p.Dv) break;
#pragma unroll 1
    for (int i = own; i < rows; i += kRowsAtOnce) {
      uint16_t* gChunk = gOut + (work.q.begin + t + i) * p.out_strides.row + column;
      *reinterpret_cast<uint4*>(gChunk) = *sOut.at(row + i, slab * Tile::kSlabChunks + chunk);
    }
  }
}

// A group's rows of out go through shared memory to where they belong.
template <class Element, class C>
__device__ __forceinline__ void store_out(const Consumer<C>& own, const AttentionVarlenParams& p,
                                          const ptx::TensorMap& out_map,
                                          const attention_fwd::Rows<C>& rows,
                                          const VarlenWork& work) {
  using Tile = typename C::Queries;
  auto& sOut = C::out_tile(own.smem);
  // Read anew: addresses that are kept all along cost spills.
  const int thread = static_cast<int>(ptx::thread_index()) % kGroupThreads;
  const int first = own.group * kGroupRows, of_warp = thread / kWarpSize * kMmaRows;
  const bool stores = thread == 0;
  if constexpr (C::kOwnOut) {
    // TMA has read the last out. Of q's place a warp writes the rows that only it has read.
    if (stores) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(kGroupDone + own.group, kGroupThreads);
  }
  const int row = first + of_warp + thread % kMmaRows;
#pragma unroll
  for (int pair = 0; pair < C::kSums / 2; ++pair) {
    uint32_t columns[4];
    pack_a<Element>(columns, rows.acc[0][2 * pair], rows.acc[0][2 * pair + 1]);
    ptx::stmatrix_x4(sOut.at(row, 2 * pair + thread % kWarpSize / kMmaRows), columns);
  }
  const int t_first = work.tile.tile * C::kBlockT + first;
  const bool whole = t_first + kGroupRows <= work.q.length;
  ptx::fence_proxy_async();  // before TMA reads out, or brings another q to its place
  if (!whole) {
    __syncwarp();
    store_ragged(p, work, sOut, first + of_warp, t_first + of_warp);
  }
  ptx::named_barrier_sync(kGroupDone + own.group, kGroupThreads);
  if (!stores) return;
  for (int slab = 0; slab < Tile::kSlabs && whole; ++slab) {
    const int column = slab * Tile::kSlabColumns;
    if (column >= p.Dv) break;
    ptx::tma_store(out_map, &sOut.chunks[slab][first][0],
                   {column, work.q.begin + t_first, work.head, 0});
  }
  ptx::bulk_commit();
  if constexpr (!C::kOwnOut) {
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&own.smem.barriers.q_empty[0]);
  }
}

// The dense forward's walk over the keys of a Work.
template <class Element, class C>
__device__ __forceinline__ void walk(const AttentionVarlenParams& p,
                                     typename C::SharedStorage& smem, int group, BasedRows<C>& rows,
                                     const VarlenWork& work, int place, unsigned n) {
  const AttentionForwardParams one = one_head(p, work);
  const Consumer<C> own{smem, one, group};
  if constexpr (C::kGeneral) {
    walk_in_sequence<Element, C>(own, rows, work, place, n);
  } else if (work.walk.count > 0) {
    walk_overlapped<Element, C>(own, rows, work, place, n);
  } else if constexpr (C::kOwnOut) {
    release(&smem.barriers.q_empty[place]);
  }
}

template <class Element, class C>
__device__ __forceinline__ void consume(typename C::SharedStorage& smem,
                                        const AttentionVarlenParams& p,
                                        const ptx::TensorMap& out_map) {
  // By a shuffle, as in the dense forward.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0) - 1;
  if (group == C::kGroups - 1) pass_turn<C>(group);
  unsigned n = 0;
  for (unsigned round = 0;; ++round) {
    const Stage<C::kQueries> place(round);
    ptx::mbarrier_wait(&smem.barriers.q_full[place.index], place.parity);
    const VarlenWork& work = smem.work[round % kWorkSlots];
    if (work.tile.tile == kNoTile) break;
    BasedRows<C> rows;
    start_based_rows<C>(rows);
    walk<Element, C>(p, smem, group, rows, work, place.index, n);
    n += work.walk.count;
    // Read anew: what only the end needs, lse and T, would be kept through the walk.
    const AttentionForwardParams one = one_head(p, work);
    const Consumer<C> own{smem, one, group};
    finish_sums<C>(own, rows, work);
    store_out<Element, C>(own, p, out_map, rows, work);
  }
  if (group == 0) await_turn<C>(group);  // whose turn nobody took
  if constexpr (C::kOwnOut) ptx::bulk_wait_read<0>();
}

template <class Element, int kD, bool kGeneral>
__global__ void __launch_bounds__((VarlenConfig<kD, kGeneral>::kThreads), 1)
    attention_varlen_fwd_sm90(const __grid_constant__ ptx::TensorMap q_map,
                              const __grid_constant__ ptx::TensorMap k_map,
                              const __grid_constant__ ptx::TensorMap v_map,
                              const __grid_constant__ ptx::TensorMap out_map,
                              const __grid_constant__ AttentionVarlenParams p,
                              const TileOrder order, int* counter) {
  using C = VarlenConfig<kD, kGeneral>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  if (threadIdx.x == 0) {
    constexpr int kWarps = C::kConsumers / kWarpSize;
    ptx::tma_prefetch(q_map);
    ptx::tma_prefetch(k_map);
    ptx::tma_prefetch(v_map);
    ptx::tma_prefetch(out_map);
    ptx::mbarrier_init(&smem.v_raw, 1);
    smem.barriers.init(kWarps, 1 + (C::kOwnOut ? kWarps : C::kGroups));
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) {
      produce_keys<C>(smem, p, q_map, k_map, order, counter);
    } else if (threadIdx.x < 2 * kWarpSize) {
      produce_values<C>(smem, v_map, p.group);
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    consume<Element, C>(smem, p, out_map);
  }
}

}  // namespace attention_varlen
}  // namespace fused_lm
