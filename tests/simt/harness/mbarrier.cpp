// Barriers in shared memory: counted arrivals, phases told apart by parity; transaction counts join
// with sm_90. The state lies here; the object's word only shows whether somebody stores over it.
#include <algorithm>
#include <cstdio>

#include "harness/race.h"
#include "harness/state.h"

namespace simt {
namespace {

constexpr uint64_t kAlive = 0x6d62617272696572;  // no pattern that a kernel writes by chance
constexpr uint64_t kDead = ~0ull;

uint64_t& word_of(const Block& b, uint32_t address) {
  return *reinterpret_cast<uint64_t*>(b.smem + address - kSharedBase);
}

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
  const std::string overwritten = overwritten_since_init(block(), address, found->second);
  if (!overwritten.empty())
    fail("%s at %s: %s", what, to_string(here).c_str(), overwritten.c_str());
  return found->second;
}

}  // namespace

std::string overwritten_since_init(const Block& b, uint32_t address, const MBarrier& barrier) {
  if (word_of(b, address) == kAlive) return "";
  char text[200];
  snprintf(text, sizeof text, "the live mbarrier at smem+0x%x, init at %s, was written over",
           address - kSharedBase, to_string(barrier.here).c_str());
  return text;
}

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
  word_of(block(), address) = kAlive;
}

void mbarrier_invalidate(uint64_t* barrier, Location here) {
  if (!takes_part("mbarrier inval", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier inval", here);
  if (!existing(address, "mbarrier inval", here).waiters.empty()) {
    fail("mbarrier inval at %s: threads wait for it", to_string(here).c_str());
  }
  if (kRaceBuild) block().race->thread_access(self().id, address - kSharedBase, 8, true, {here});
  block().mbarriers.erase(address);
  word_of(block(), address) = kDead;
}

void arrive_at(uint32_t address, const VectorClock& clock, TrackedCopies copies, Location here) {
  MBarrier& m = existing(address, "mbarrier arrive", here);
  if (copies.up_to_copy > 0) m.copies_arriving.push_back(copies);
  if (kRaceBuild) join_clocks(m.arriving, clock);
  m.last_arrival = here;
  if (--m.pending > 0) return;
  m.pending = m.count;
  ++m.phase;
  if (kRaceBuild) join_clocks(m.ended, m.arriving);
  m.arriving.clear();
  m.copies_ended.insert(m.copies_ended.end(), m.copies_arriving.begin(), m.copies_arriving.end());
  m.copies_arriving.clear();
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
  arrive_at(address, clock, {self().id, 0}, here);
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
  MBarrier& m = existing(address, "mbarrier wait", here);
  for (const TrackedCopies& copies : m.copies_ended) {
    size_t& waited_for = block().fibers[copies.thread]->copies_waited_for;
    waited_for = std::max(waited_for, copies.up_to_copy);
  }
  m.copies_ended.clear();
  if (kRaceBuild) block().race->acquire(self().id, m.ended);
}

}  // namespace simt
