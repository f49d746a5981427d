// Barriers in shared memory: counted arrivals, phases told apart by parity. The object's bytes are
// not touched; transaction counts join with sm_90.
#include "harness/race.h"
#include "harness/state.h"

namespace simt {
namespace {

uint32_t address_of(const uint64_t* barrier, const char* what, Location here) {
  const uint32_t address = shared_address(barrier);
  checked_shared_offset(address, 8, what, here);
  if (address % 8) {
    fail("%s at %s: shared address 0x%x is not 8-byte aligned", what, to_string(here).c_str(),
         address);
  }
  return address;
}

MBarrier& existing(uint32_t address, const char* what, Location here) {
  const auto found = block().mbarriers.find(address);
  if (found == block().mbarriers.end()) {
    fail("%s at %s: no mbarrier was initialised at smem+0x%x", what, to_string(here).c_str(),
         address - kSharedBase);
  }
  return found->second;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Location here) {
  if (!takes_part("mbarrier init", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier init", here);
  if (arrivals < 1 || arrivals >= 1u << 20) {
    fail("mbarrier init at %s: %u arrivals", to_string(here).c_str(), arrivals);
  }
  if (block().mbarriers.count(address)) {
    fail("mbarrier init at %s: one lives at smem+0x%x already", to_string(here).c_str(),
         address - kSharedBase);
  }
  if (kRaceBuild) block().race->thread_access(self().id, address - kSharedBase, 8, true, {here});
  MBarrier fresh;
  fresh.count = arrivals;
  fresh.pending = arrivals;
  fresh.here = here;
  block().mbarriers.emplace(address, std::move(fresh));
}

void mbarrier_invalidate(uint64_t* barrier, Location here) {
  const uint32_t address = address_of(barrier, "mbarrier inval", here);
  if (!existing(address, "mbarrier inval", here).waiters.empty()) {
    fail("mbarrier inval at %s: threads wait for it", to_string(here).c_str());
  }
  if (kRaceBuild) block().race->thread_access(self().id, address - kSharedBase, 8, true, {here});
  block().mbarriers.erase(address);
}

void arrive_at(uint32_t address, const VectorClock& clock, Location here) {
  MBarrier& m = existing(address, "mbarrier arrive", here);
  if (kRaceBuild) join_clocks(m.arriving, clock);
  m.last_arrival = here;
  if (--m.pending > 0) return;
  m.pending = m.count;
  ++m.phase;
  if (kRaceBuild) join_clocks(m.ended, m.arriving);
  m.arriving.clear();
  for (int thread : m.waiters) wake(thread);
  m.waiters.clear();
}

void mbarrier_arrive(uint64_t* barrier, Location here) {
  if (!takes_part("mbarrier arrive", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier arrive", here);
  VectorClock clock;
  if (kRaceBuild) {
    // The word is used as mbarrier_init left it: a race if nothing orders the two.
    block().race->thread_access(self().id, address - kSharedBase, 8, false, {here});
    block().race->release(self().id, clock);
  }
  arrive_at(address, clock, here);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Location here) {
  if (!takes_part("mbarrier wait", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier wait", here);
  if (kRaceBuild) block().race->thread_access(self().id, address - kSharedBase, 8, false, {here});
  const uint64_t begun = existing(address, "mbarrier wait", here).phase;
  if ((begun & 1) == (parity & 1)) {
    existing(address, "mbarrier wait", here).waiters.push_back(self().id);
    wait_for("mbarrier wait", here, address, parity);
    // A GPU's thread looks again and again, and would miss a phase that is over so soon.
    if (existing(address, "mbarrier wait", here).phase > begun + 1) {
      fail("mbarrier wait at %s: two phases ended before the thread saw the first",
           to_string(here).c_str());
    }
  }
  if (kRaceBuild) {
    block().race->acquire(self().id, existing(address, "mbarrier wait", here).ended);
  }
}

}  // namespace simt
