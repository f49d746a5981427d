// Barriers in shared memory: counted arrivals and bytes, phases told apart by parity. The state
// lies here; the object's word only shows whether somebody stores over it.
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

std::string overwritten_since_init(const Block& b, uint32_t address, const MBarrier& barrier) {
  if (word_of(b, address) == kAlive) return "";
  char text[200];
  snprintf(text, sizeof text, "the live mbarrier at smem+0x%x, init at %s, was written over",
           address - kSharedBase, to_string(barrier.here).c_str());
  return text;
}

// The word is used as mbarrier_init left it: a race if nothing orders the two.
void note_use(const Block& owner, uint32_t address, Location here) {
  if (kRaceBuild) race().thread_access(owner, address - kSharedBase, 8, false, {here});
}

MBarrier& existing(uint32_t address, const char* what, Location here) {
  return mbarrier_of(block(), address, what, here);
}

// The phase ends when arrivals and bytes have come.
void end_phase_if_complete(Block& owner, MBarrier& m, Location here) {
  if (m.pending > 0 || m.bytes != 0) return;
  if (m.loads > 0) {
    fail(
        "a phase of the mbarrier of %s ended at %s while %d bulk loads into it were under way: too "
        "few bytes were expected",
        to_string(m.here).c_str(), to_string(here).c_str(), m.loads);
  }
  m.pending = m.count;
  ++m.phase;
  if (kRaceBuild) {
    raise_time(m.arriving, race().loads_of(m.agent), static_cast<uint32_t>(m.phase));
    join_clocks(m.ended, m.arriving);
  }
  m.arriving.clear();
  m.copies_ended.insert(m.copies_ended.end(), m.copies_arriving.begin(), m.copies_arriving.end());
  m.copies_arriving.clear();
  for (int thread : m.waiters) wake(owner, thread);
  m.waiters.clear();
}

void expect_bytes(MBarrier& m, uint32_t bytes, Location here) {
  constexpr int64_t kMostBytes = (1 << 20) - 1;
  m.bytes += bytes;
  if (m.bytes <= kMostBytes) return;
  fail("mbarrier expect at %s: %lld bytes, at most %lld", to_string(here).c_str(),
       static_cast<long long>(m.bytes), static_cast<long long>(kMostBytes));
}

void arrive(Block& owner, uint32_t address, const char* what, uint32_t bytes, Location here) {
  note_use(owner, address, here);
  VectorClock clock;
  if (kRaceBuild) race().release(self().agent, clock);
  if (bytes > 0) expect_bytes(mbarrier_of(owner, address, what, here), bytes, here);
  arrive_at(owner, address, clock, {self().id, 0}, here);
}

}  // namespace

MBarrier& mbarrier_of(Block& owner, uint32_t address, const char* what, Location here) {
  const auto found = owner.mbarriers.find(address);
  if (found == owner.mbarriers.end()) {
    fail("%s at %s: no mbarrier was initialised at smem+0x%x", what, to_string(here).c_str(),
         address - kSharedBase);
  }
  const std::string overwritten = overwritten_since_init(owner, address, found->second);
  if (!overwritten.empty())
    fail("%s at %s: %s", what, to_string(here).c_str(), overwritten.c_str());
  return found->second;
}

std::string unfinished_mbarriers(const Block& b) {
  for (const auto& [address, m] : b.mbarriers) {
    const std::string overwritten = overwritten_since_init(b, address, m);
    if (!overwritten.empty()) return "block ended: " + overwritten;
    char text[360];
    if (m.bytes != 0) {
      snprintf(text, sizeof text,
               "block ended with %lld bytes expected in a phase of the mbarrier at smem+0x%x, init "
               "at %s",
               static_cast<long long>(m.bytes), address - kSharedBase, to_string(m.here).c_str());
      return text;
    }
    if (m.pending == m.count) continue;
    snprintf(text, sizeof text,
             "block ended with %d of %u arrivals in a phase of the mbarrier at smem+0x%x, init at "
             "%s, the last arrival at %s",
             static_cast<int>(m.count - m.pending), m.count, address - kSharedBase,
             to_string(m.here).c_str(), to_string(m.last_arrival).c_str());
    return text;
  }
  return "";
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
  if (kRaceBuild) race().thread_access(block(), address - kSharedBase, 8, true, {here});
  MBarrier fresh;
  fresh.count = arrivals;
  fresh.pending = arrivals;
  fresh.here = here;
  fresh.agent = cluster().mbarriers++;
  fresh.initialiser = self().id;
  block().mbarriers.emplace(address, std::move(fresh));
  word_of(block(), address) = kAlive;
}

void mbarrier_invalidate(uint64_t* barrier, Location here) {
  if (!takes_part("mbarrier inval", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier inval", here);
  if (!existing(address, "mbarrier inval", here).waiters.empty()) {
    fail("mbarrier inval at %s: threads wait for it", to_string(here).c_str());
  }
  if (kRaceBuild) race().thread_access(block(), address - kSharedBase, 8, true, {here});
  block().mbarriers.erase(address);
  word_of(block(), address) = kDead;
}

void fence_mbarrier_init(Location here) {
  if (!takes_part("fence mbarrier init", here)) return;
  for (auto& [address, m] : block().mbarriers) m.fenced |= m.initialiser == self().id;
}

void arrive_at(Block& owner, uint32_t address, const VectorClock& clock, TrackedCopies copies,
               Location here) {
  MBarrier& m = mbarrier_of(owner, address, "mbarrier arrive", here);
  if (copies.up_to_copy > 0) m.copies_arriving.push_back(copies);
  if (kRaceBuild) join_clocks(m.arriving, clock);
  m.last_arrival = here;
  if (--m.pending < 0) {
    fail("mbarrier arrive at %s: more than the %u arrivals of a phase, init at %s",
         to_string(here).c_str(), m.count, to_string(m.here).c_str());
  }
  end_phase_if_complete(owner, m, here);
}

void complete_bytes(Block& owner, uint32_t address, int64_t bytes, Location here) {
  MBarrier& m = mbarrier_of(owner, address, "bulk load", here);
  --m.loads;
  m.bytes -= bytes;
  end_phase_if_complete(owner, m, here);
}

void mbarrier_arrive(uint64_t* barrier, Location here) {
  if (!takes_part("mbarrier arrive", here)) return;
  arrive(block(), address_of(barrier, "mbarrier arrive", here), "mbarrier arrive", 0, here);
}

void mbarrier_arrive_at(uint64_t* barrier, int rank, Location here) {
  if (!takes_part("mbarrier arrive at", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier arrive at", here);
  arrive(block_of_rank(rank, "mbarrier arrive at", here), address, "mbarrier arrive at", 0, here);
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes, bool arrives, Location here) {
  if (!takes_part("mbarrier expect", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier expect", here);
  if (arrives) {
    arrive(block(), address, "mbarrier expect", bytes, here);
    return;
  }
  note_use(block(), address, here);
  expect_bytes(existing(address, "mbarrier expect", here), bytes, here);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Location here) {
  if (!takes_part("mbarrier wait", here)) return;
  const uint32_t address = address_of(barrier, "mbarrier wait", here);
  note_use(block(), address, here);
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
  if (kRaceBuild) race().acquire(self().agent, m.ended);
}

}  // namespace simt
