// What is wrong with a block that can't go on, or has ended.
#include <cstdio>
#include <cstring>

#include "harness/state.h"

namespace simt {
namespace {

std::string describe_wait(const Block& b, const Fiber& fiber) {
  const Wait& wait = fiber.wait;
  const std::string here = to_string(wait.here);
  char text[320];
  if (fiber.state == State::kDone) return "has ended";
  if (!strcmp(wait.kind, "mbarrier wait")) {
    const MBarrier& m = b.mbarriers.at(static_cast<uint32_t>(wait.object));
    snprintf(text, sizeof text,
             "mbarrier wait at %s: smem+0x%x parity %d (phase %d, %d of %u arrivals missing%s; "
             "init at %s)",
             here.c_str(), static_cast<uint32_t>(wait.object) - kSharedBase,
             static_cast<int>(wait.detail), static_cast<int>(m.phase), static_cast<int>(m.pending),
             m.count, m.bytes ? (" and " + std::to_string(m.bytes) + " bytes").c_str() : "",
             to_string(m.here).c_str());
  } else if (!strcmp(wait.kind, "barrier")) {
    const NamedBarrier& n = b.barriers[wait.object];
    snprintf(text, sizeof text, "barrier %d at %s (%d of %d threads have arrived)",
             static_cast<int>(wait.object), here.c_str(), n.arrived, n.expected);
  } else {
    snprintf(text, sizeof text, "%s at %s, mask %08x", wait.kind, here.c_str(),
             static_cast<uint32_t>(wait.object));
  }
  return text;
}

}  // namespace

std::string deadlock_report(const Block& b) {
  char line[400];
  snprintf(line, sizeof line, "deadlock in block (%u, %u, %u):", b.index.x, b.index.y, b.index.z);
  std::string report = line;
  for (int warp = 0; warp < b.warps_count; ++warp) {
    std::map<std::string, uint32_t> lanes_of;
    for (int lane = 0; lane < kWarpSize && warp * kWarpSize + lane < b.threads; ++lane) {
      lanes_of[describe_wait(b, *b.fibers[warp * kWarpSize + lane])] |= 1u << lane;
    }
    for (const auto& [what, lanes] : lanes_of) {
      snprintf(line, sizeof line, "\n  warp %d lanes %08x: %s", warp, lanes, what.c_str());
      report += line;
    }
  }
  return report;
}

std::string unfinished(const Block& b) {
  for (const Warp& warp : b.warps) {
    for (const Collective& c : warp.open) {
      return std::string("block ended while lanes wait in ") + c.kind + " at " + to_string(c.here);
    }
  }
  for (int i = 0; i < kNamedBarriers; ++i) {
    if (b.barriers[i].arrived == 0) continue;
    return "block ended with " + std::to_string(b.barriers[i].arrived) + " arrivals at barrier " +
           std::to_string(i) + ", last at " + to_string(b.barriers[i].here);
  }
  const std::string of_mbarriers = unfinished_mbarriers(b);
  if (!of_mbarriers.empty()) return of_mbarriers;
  const std::string registers = uneven_registers(b);
  if (!registers.empty()) return registers;
  const std::string products = leftover_products(b);
  if (!products.empty()) return products;
  for (const auto& fiber : b.fibers) {
    const std::string copies = leftovers(*fiber);
    const std::string& left = copies.empty() ? leftover_stores(*fiber) : copies;
    if (!left.empty()) return "thread " + std::to_string(fiber->id) + " ended with " + left;
  }
  return "";
}

}  // namespace simt
