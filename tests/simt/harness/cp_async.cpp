// cp.async: copies that happen between their issue and the wait for their group.
#include <algorithm>
#include <cstring>

#include "harness/memory.h"
#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {
namespace {

constexpr int kInFlightByte = 0xfd;  // what shared memory holds until a lazy copy happens

void perform(Copy& copy) {
  if (copy.done) return;
  memset(copy.shared, 0, copy.bytes);
  if (copy.source_bytes > 0) memcpy(copy.shared, copy.global, copy.source_bytes);
  copy.done = true;
  if (kRaceBuild) race().expect_change(block(), copy.shared, copy.bytes);
}

// Serial number of the thread's oldest copy that has not happened.
size_t oldest_open(const Fiber& fiber) {
  for (const CopyGroup& group : fiber.groups) {
    for (const Copy& copy : group.copies) {
      if (!copy.done) return copy.serial;
    }
  }
  for (const Copy& copy : fiber.open_group.copies) {
    if (!copy.done) return copy.serial;
  }
  return fiber.copies_issued + 1;
}

// Arrivals whose copies have all happened.
void settle(Fiber& fiber) {
  while (!fiber.arrivals.empty() && fiber.arrivals.front().after_copy < oldest_open(fiber)) {
    const PendingArrival arrival = fiber.arrivals.front();
    fiber.arrivals.erase(fiber.arrivals.begin());
    VectorClock clock;
    if (kRaceBuild) race().release_copies(fiber.agent, arrival.after_copy, clock);
    arrive_at(block(), arrival.barrier, clock, {fiber.id, arrival.after_copy}, arrival.here);
  }
}

void perform_all(CopyGroup& group) {
  for (Copy& copy : group.copies) perform(copy);
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Location here) {
  Fiber& fiber = self();
  const uint32_t address = shared_address(shared);
  const uint32_t offset = checked_shared_offset(address, bytes, "cp.async", here);
  if (address % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
    fail("cp.async at %s: %d bytes to 0x%x from %p are not aligned", to_string(here).c_str(), bytes,
         address, global);
  }
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp.async at %s: %d source bytes of %d", to_string(here).c_str(), source_bytes, bytes);
  }
  const size_t serial = ++fiber.copies_issued;
  if (source_bytes > 0) {
    checked_global(global, source_bytes, "cp.async", here);
  }
  if (kRaceBuild) {
    const Viewer viewer = race().thread_view(fiber.agent);
    const Epoch epoch{static_cast<uint16_t>(race().copies_of(fiber.agent)),
                      static_cast<uint32_t>(serial), here};
    if (source_bytes > 0) global_async_access(viewer, epoch, global, source_bytes, Kind::kRead);
    race().access(block(), viewer, epoch, offset, bytes, true);
  }
  Copy copy{static_cast<char*>(shared),
            static_cast<const char*>(global),
            bytes,
            source_bytes,
            serial,
            here,
            false};
  if (happens_now()) {
    perform(copy);
  } else {
    memset(shared, kInFlightByte, bytes);
  }
  fiber.open_group.copies.push_back(copy);
}

void cp_async_commit(Location here) {
  if (!takes_part("cp.async commit", here)) return;
  Fiber& fiber = self();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group = {};
}

void cp_async_wait(int pending_groups, Location here) {
  if (!takes_part("cp.async wait", here)) return;
  Fiber& fiber = self();
  while (static_cast<int>(fiber.groups.size()) > pending_groups) {
    perform_all(fiber.groups.front());
    fiber.groups.erase(fiber.groups.begin());
  }
  settle(fiber);
  if (!kRaceBuild) return;
  size_t in_flight = fiber.open_group.copies.size();
  for (const CopyGroup& group : fiber.groups) in_flight += group.copies.size();
  const size_t done = fiber.copies_issued - in_flight;
  race().acquire_time(fiber.agent, race().copies_of(fiber.agent), static_cast<uint32_t>(done));
}

void mbarrier_arrive_cp_async(uint64_t* barrier, Location here) {
  if (!takes_part("mbarrier arrive cp.async", here)) return;
  Fiber& fiber = self();
  const uint32_t address = shared_address(barrier);
  checked_shared_offset(address, 8, "mbarrier arrive cp.async", here);
  if (kRaceBuild) race().thread_access(block(), address - kSharedBase, 8, false, {here});
  fiber.arrivals.push_back({address, fiber.copies_issued, here});
  fiber.copies_tracked = fiber.copies_issued;
  settle(fiber);
}

bool progress_copies() {
  for (const auto& b : cluster().blocks) {
    std::vector<Fiber*> waiting;
    for (const auto& fiber : b->fibers) {
      if (!fiber->arrivals.empty()) waiting.push_back(fiber.get());
    }
    if (waiting.empty()) continue;
    current_block = b.get();
    const bool any = config.order == Order::kRandom;
    Fiber& fiber = *waiting[any ? b->random() % waiting.size() : 0];
    for (CopyGroup& group : fiber.groups) perform_all(group);
    perform_all(fiber.open_group);
    settle(fiber);
    return true;
  }
  return false;
}

std::string leftovers(const Fiber& fiber) {
  const auto of_group = [&](const CopyGroup& group, const char* without_mbarrier) -> std::string {
    for (const Copy& copy : group.copies) {
      if (copy.serial <= fiber.copies_waited_for) continue;
      const bool tracked = copy.serial <= fiber.copies_tracked;
      return std::string("a cp.async ") +
             (tracked ? "whose mbarrier nobody waited for" : without_mbarrier) + ", issued at " +
             to_string(copy.here);
    }
    return "";
  };
  for (const CopyGroup& group : fiber.groups) {
    const std::string left = of_group(group, "that nobody waited for");
    if (!left.empty()) return left;
  }
  return of_group(fiber.open_group, "that was never committed");
}

}  // namespace simt
