// What products of the running warp do to its registers (wgmma.cpp).
#pragma once

#include "harness/state.h"

namespace simt {

constexpr int kProductRows = 16;  // a warp's

inline WarpProducts& products_of_warp() { return block().warps[self().warp].products; }
inline Fiber& lane_of_warp(int lane) { return *block().fibers[self().warp * kWarpSize + lane]; }

// In the race build, at the issue: untouched since the last fence.
void check_registers(const WarpProduct& product);
// The sums move from the registers, which hold NaN from now on, and back.
void begin_sums(WarpProducts& products, const WarpProduct& product);
void end_sums(WarpProducts& products, const WarpProduct& product);
// A left operand in registers: as it was at the issue, [k][rows]; and that it still is so.
void load_registers(std::vector<float>& values, const WarpProduct& product);
void check_left_operand(const WarpProduct& product);

}  // namespace simt
