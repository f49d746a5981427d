// Operations of a warp: all lanes of a mask meet at one place, the last to come does the work.
#include <cstring>

#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {
namespace {

Collective& join(Warp& warp, const char* kind, uint32_t mask, Location here) {
  for (Collective& c : warp.open) {
    if ((c.mask & mask) == 0) continue;
    if (c.mask != mask || strcmp(c.kind, kind) || !same_place(c.here, here)) {
      fail(
          "lanes of a warp part: %s at %s with mask %08x, but lanes %08x wait in %s at %s with "
          "mask %08x",
          kind, to_string(here).c_str(), mask, c.arrived, c.kind, to_string(c.here).c_str(),
          c.mask);
    }
    return c;
  }
  Collective fresh;
  fresh.kind = kind;
  fresh.mask = mask;
  fresh.here = here;
  warp.open.push_back(fresh);
  return warp.open.back();
}

}  // namespace

void warp_collective(const char* kind, uint32_t mask, void* record, WarpFunction run,
                     Location here) {
  const Fiber& fiber = self();
  Warp& warp = block().warps[fiber.warp];
  if (!(mask >> fiber.lane & 1)) {
    fail("%s at %s: lane %d calls, but is not in mask %08x", kind, to_string(here).c_str(),
         fiber.lane, mask);
  }
  mask &= existing_lanes(fiber.warp);
  Collective& meeting = join(warp, kind, mask, here);
  meeting.records[fiber.lane] = record;
  meeting.arrived |= 1u << fiber.lane;
  if (meeting.arrived != mask) {
    wait_for(kind, here, mask);
    return;
  }
  std::array<void*, kWarpSize> records = meeting.records;
  std::erase_if(warp.open, [&](const Collective& c) { return c.mask == mask; });
  run(records.data(), mask);
  if (mask == existing_lanes(fiber.warp)) flush_transactions(fiber.warp);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) && lane != fiber.lane) wake(block(), fiber.warp * kWarpSize + lane);
  }
}

void sync_warp(uint32_t mask, Location here) {
  if (!takes_part("__syncwarp", here)) return;
  warp_collective(
      "__syncwarp", mask, nullptr,
      [](void**, uint32_t mask) {
        if (kRaceBuild) race().synchronise_lanes(self().agent - self().lane, mask);
      },
      here);
}

uint32_t vote(uint32_t mask, bool predicate, Location here) {
  struct Record {
    bool predicate;
    uint32_t ballot;
  } record{predicate, 0};
  warp_collective(
      "warp vote", mask, &record,
      [](void** records, uint32_t mask) {
        uint32_t ballot = 0;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if ((mask >> lane & 1) && static_cast<Record*>(records[lane])->predicate) {
            ballot |= 1u << lane;
          }
        }
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if (mask >> lane & 1) static_cast<Record*>(records[lane])->ballot = ballot;
        }
      },
      here);
  return record.ballot;
}

}  // namespace simt
