// Sums over threads, always in one order: results repeat bitwise.
#pragma once

#include "common/types.h"
#include "ptx/barrier.h"
#include "ptx/builtins.h"

namespace fused_lm {

constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over every aligned group of `lanes` lanes, a power of two that the warp agrees on. All lanes
// call, and each gets its group's sums: both partners add the same two numbers.
template <int kValues>
__device__ __forceinline__ void lanes_sum(float (&value)[kValues], int lanes) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < lanes) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        value[k] += __shfl_xor_sync(kAllLanes, value[k], offset);
      }
    }
  }
}

// The same over groups of threads lanes_apart, 2 * lanes_apart, ... lanes apart in a warp.
template <int kValues>
__device__ __forceinline__ void strided_lanes_sum(float (&value)[kValues], int lanes_apart) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset >= lanes_apart) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        value[k] += __shfl_xor_sync(kAllLanes, value[k], offset);
      }
    }
  }
}

// Sums over `warps` warps from first_warp on, which `barrier` is for, through one slot of sSums per
// warp of the block; a value's slots are adjacent, so lanes that read them meet no bank conflict.
// The slots are free again once every warp has passed a later barrier.
template <int kValues, int kMaxWarps>
__device__ __forceinline__ void warps_sum(float (&value)[kValues],
                                          float (&sSums)[kValues][kMaxWarps], int first_warp,
                                          int warps, int barrier) {
  static_assert(kMaxWarps <= kWarpSize, "a lane for every warp");
  lanes_sum(value, kWarpSize);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
    for (int k = 0; k < kValues; ++k) sSums[k][warp] = value[k];
  }
  ptx::named_barrier_sync(barrier, warps * kWarpSize);
  int lanes = 2;
  while (lanes < warps) lanes *= 2;
  const int other = lane % lanes;
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    value[k] = other < warps ? sSums[k][first_warp + other] : 0.0f;
  }
  lanes_sum(value, lanes);
}

}  // namespace fused_lm
