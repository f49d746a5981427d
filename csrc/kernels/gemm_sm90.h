// Matrix product for Hopper whose epilogue is a layer: out = epilogue(a b^T), by TMA and wgmma,
// with warps that do only one of the two.
//
// Grid: a block per multiprocessor, or per tile where there are fewer. It takes tile after tile,
// `gridDim.x` apart, in the order of tile_at. Warpgroup 0 produces: one thread copies 64 of K of
// both operands per stage, as many stages ahead as there are. The two others consume.
//
// Cooperative, a tile [128, 256]: each has 64 rows of every tile.
//
//   group 0   products of tile 0 | epilogue | products of tile 1 | epilogue
//   group 1   products of tile 0 | epilogue | products of tile 1 | epilogue
//
// Ping-pong, tiles [128, 192] or [128, 128]: each has every other tile, and its turn to multiply.
//
//   group 0   products of tile 0 | epilogue of 0      | products of tile 2 | ...
//   group 1        -             | products of tile 1 | epilogue of 1      | ...
//
// The turn is given up when the last products are issued, so that the tensor cores don't wait.
//
// clang-format off
// Barrier                who arrives                     who waits, and what for
//   full + stage         producer; bytes of both         consumers: 64 of K
//                        operands, its own and others'
//   empty + stage        consumers of the tile: a lane   producer: the stage's place
//                        per warp; those of the cluster
//   kTurn + group        the other group                 the group: its products may begin
//   source_full + group  another producer; bytes        the group: the tile that its epilogue reads
//   source_empty + group its first thread                that producer: the place of the tile
//     or, where an epilogue is gated, of each slab: source_full + group, slab; source_empty + slab
//   kSlabWritten + group the group                       its first thread: results to be stored;
//                                                        the group: the other slab is free
// clang-format on
//
// Clusters of two blocks, one below the other, where the tuning has them: each brings half of b for
// both. They walk through the same tiles, even where the lower one is outside of the matrix.
//
// Of a gated layer a cooperative tile has 128 columns: b's first half is their gates, the second
// their values, so that a lane has both of a column in its sums.
//
// Where tiles don't fill the GPU, or its last wave, blocks share them: gemm_parts_sm90.h.
//
// Operands lie in memory either way (common/matrix_descriptor.h): wgmma reads K-major rows as well
// as turned ones, so no product needs a transpose of its own.
//
//   forward           y = x w^T      x and w as they are; a w of [in, out] is turned
//   gradient of x     dx = dy w      the other way round
//   gradient of w     dw = dy^T x    both turned
//
// Bytes: 2 (M K tiles_n + N K tiles_m), mostly from the L2, and 2 M N per output, gated 1 M N and 2
// M N of pre, where N are the rows of b. FLOPs: 2 M N K, each rounded up to whole tiles. What
// binds: gemm_tuning_sm90.h.
//
// Sources: PTX 9.7.15, asynchronous warpgroup level matrix instructions.
#pragma once

#include "kernels/gemm_activation_bwd_sm90.h"
#include "kernels/gemm_activation_sm90.h"
#include "kernels/gemm_gated_bwd_sm90.h"
#include "kernels/gemm_gated_sm90.h"
#include "kernels/gemm_gradient_sm90.h"
#include "kernels/gemm_linear_sm90.h"
#include "kernels/gemm_producer_sm90.h"
#include "kernels/gemm_residual_sm90.h"
#include "ptx/launch.h"
#include "ptx/registers.h"

namespace fused_lm {
namespace gemm {

template <class C, class Epilogue>
__device__ __forceinline__ void consume(typename C::SharedStorage& smem, const Arguments& args,
                                        int group) {
  Consumer<C> own(smem, args, group);
  const uint64_t a = own.left(), b = own.right();
  const int tiles = args.whole, step = static_cast<int>(gridDim.x);
  const int other = 1 - group;
  int tile = static_cast<int>(blockIdx.x);
  if constexpr (C::kPingPong) {
    if (group == 1) {
      ptx::named_barrier_arrive(kTurn, kGroups * kGroupThreads);
      own.ring.skip(k_tile_count(args));
      tile += step;
    }
  }
#pragma unroll 1
  while (tile < tiles) {
    Epilogue epilogue{};
    if constexpr (std::is_same_v<Epilogue, ResidualEpilogue>) {
      const TileAt at = tile_at(args, tile);
      epilogue.draw(own, at.row + own.first_row(), at.column);
    }
    Sums<C> sums;
    if constexpr (C::kPingPong) {
      ptx::named_barrier_sync(kTurn + group, kGroups * kGroupThreads);
    }
    own.multiply(sums, a, b, k_tile_count(args), [&] {
      if constexpr (C::kPingPong) {
        if (tile + step < tiles) {
          ptx::named_barrier_arrive(kTurn + other, kGroups * kGroupThreads);
        }
      }
    });
    if constexpr (C::kPingPong) own.ring.skip(k_tile_count(args));
    const TileAt at = tile_at(args, tile);
    epilogue(own, sums, at.row + own.first_row(), at.column);
    tile += C::kPingPong ? kGroups * step : step;
  }
  if (Consumer<C>::thread() == 0) ptx::bulk_wait_read<0>();
}

template <class Element, GemmSchedule kSchedule, Layout kLayout, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90(const __grid_constant__ Arguments args) {
  using C = Config<Element, kSchedule, kLayout>;
  auto& smem = dynamic_smem<typename C::SharedStorage>();
  const int warpgroup = own_warpgroup();
  start_block<C>(smem, args);
  if (warpgroup == 0) {
    ptx::registers_decrease<24>();
    if (threadIdx.x == 0) produce<C>(smem, args);
    if constexpr (C::kLoads) {
      if (threadIdx.x == kWarpSize) {
        if constexpr (std::is_same_v<Epilogue, GatedBackwardEpilogue>) {
          produce_gated_sources<C>(smem, args);
        } else {
          produce_sources<C>(smem, args);
        }
      }
    }
  } else {
    ptx::registers_increase<240>();
    consume<C, Epilogue>(smem, args, warpgroup - 1);
  }
  end_block<C>();
}

}  // namespace gemm
}  // namespace fused_lm
