// setmaxnreg (PTX 9.7.19): registers that warps give back and others wait for.
#include <algorithm>

#include "harness/state.h"

namespace simt {
namespace {

constexpr int kOfMultiprocessor = 64 * 1024, kLeast = 24, kMost = 256, kStep = 8, kGroupWarps = 4;

// Those who wait get what is free, in the order of warps.
void grant() {
  Block& b = block();
  for (int warp = 0; warp < b.warps_count; ++warp) {
    Warp& w = b.warps[warp];
    const int more = (w.registers_wanted - w.registers) * kWarpSize;
    if (w.registers_wanted == 0 || more > b.free_registers) continue;
    b.free_registers -= more;
    w.registers = w.registers_wanted;
    w.registers_wanted = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) wake(b, warp * kWarpSize + lane);
  }
}

struct Request {
  int count;
  bool increases;
  Location here;
};

void change(void** lanes, uint32_t) {
  const Request& request = *static_cast<Request*>(lanes[0]);
  Block& b = block();
  Warp& w = b.warps[self().warp];
  const int has = w.registers == 0 ? launch_registers(b.threads) : w.registers;
  if (request.increases ? request.count < has : request.count > has) {
    fail("setmaxnreg at %s: %s from %d to %d registers", to_string(request.here).c_str(),
         request.increases ? "increase" : "decrease", has, request.count);
  }
  w.registers = has;
  w.registers_set = request.here;
  if (request.increases) {
    w.registers_wanted = request.count;
  } else {
    w.registers = request.count;
    b.free_registers += (has - request.count) * kWarpSize;
  }
  grant();
}

}  // namespace

// A kernel that uses setmaxnreg has a launch bound of its threads, one block per multiprocessor.
int launch_registers(int threads) {
  return std::min(kOfMultiprocessor / threads / kStep * kStep, kMost - kStep);
}

void set_registers(int count, bool increases, Location here) {
  if (count % kStep || count < kLeast || count > kMost) {
    fail("setmaxnreg at %s: %d registers", to_string(here).c_str(), count);
  }
  if (block().threads % (kGroupWarps * kWarpSize)) {
    fail("setmaxnreg at %s: a block of %d threads is not whole warpgroups", to_string(here).c_str(),
         block().threads);
  }
  Request request{count, increases, here};
  warp_collective("setmaxnreg", ~0u, &request, change, here);
  if (block().warps[self().warp].registers_wanted > 0) wait_for("setmaxnreg", here, ~0u);
}

std::string uneven_registers(const Block& b) {
  for (int warp = 0; warp < b.warps_count; ++warp) {
    const Warp &one = b.warps[warp], &first = b.warps[warp / kGroupWarps * kGroupWarps];
    if (one.registers == first.registers) continue;
    return "setmaxnreg at " + to_string(one.registers_set) + ": the warps of a warpgroup differ";
  }
  return "";
}

}  // namespace simt
