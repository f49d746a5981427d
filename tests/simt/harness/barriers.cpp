// Barriers of a block: __syncthreads, bar.sync, bar.arrive, __syncthreads_count.
#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {
namespace {

// Barriers count warps: lanes that the last one doesn't have arrive with it.
int all_threads() { return block().warps_count * kWarpSize; }

int checked_count(int barrier, int threads, Location here) {
  if (barrier < 0 || barrier >= kNamedBarriers) {
    fail("barrier %d at %s: there are %d", barrier, to_string(here).c_str(), kNamedBarriers);
  }
  const int count = threads == kAllThreads ? all_threads() : threads;
  if (count <= 0 || count % kWarpSize || count > all_threads()) {
    fail("barrier %d at %s: %d threads are no number of whole warps in a block of %d", barrier,
         to_string(here).c_str(), count, block().threads);
  }
  const NamedBarrier& b = block().barriers[barrier];
  if (b.arrived != 0 && b.expected != count) {
    fail("barrier %d: %d threads at %s, but %d at %s", barrier, count, to_string(here).c_str(),
         b.expected, to_string(b.here).c_str());
  }
  return count;
}

// One instruction of a warp: its lanes may not come by two ways, nor one of them twice.
void add_arrival(NamedBarrier& b, int barrier, Location here) {
  const int warp = self().warp;
  Arrivals& arrivals = b.of_warp.emplace(warp, Arrivals{0, here}).first->second;
  if (!same_place(arrivals.here, here)) {
    fail("lanes of a warp part: barrier %d at %s, but other lanes came to it at %s", barrier,
         to_string(here).c_str(), to_string(arrivals.here).c_str());
  }
  const uint32_t mine = 1u << self().lane;
  if (arrivals.lanes & mine) {
    fail("barrier %d at %s: the thread arrives twice before the others have come", barrier,
         to_string(here).c_str());
  }
  arrivals.lanes |= mine;
  ++b.arrived;
  const uint32_t whole = existing_lanes(warp);
  if (arrivals.lanes == whole) b.arrived += __builtin_popcount(~whole);
}

void check_whole_warps(const NamedBarrier& b, int barrier) {
  for (const auto& [warp, arrivals] : b.of_warp) {
    if (arrivals.lanes == existing_lanes(warp)) continue;
    fail(
        "lanes of a warp part: barrier %d counts to its end, but of warp %d only lanes %08x came "
        "to it at %s",
        barrier, warp, arrivals.lanes, to_string(arrivals.here).c_str());
  }
}

// Only warps that wait here have met: others may be between two accesses.
void complete(NamedBarrier& b, int barrier, Location here) {
  check_whole_warps(b, barrier);
  Block& all = block();
  int met = -1;
  for (int thread : b.waiters) {
    if (kRaceBuild) race().acquire(all.fibers[thread]->agent, b.clock);
    wake(all, thread);
    if (thread / kWarpSize != met) flush_transactions(met = thread / kWarpSize);
  }
  b.reduced = b.total;
  b.waiters.clear();
  b.of_warp.clear();
  b.clock.clear();
  const bool everybody = b.expected == all_threads();
  b.arrived = b.expected = b.total = 0;
  if (kRaceBuild && everybody) race().check_unseen_stores(all, here);
}

struct Arrival {
  bool waits = true;
  bool orders = true;  // memory
  int addend = 0;      // to what the barrier counts
};

void come(int barrier, int threads, Arrival arrival, Location here) {
  const int count = checked_count(barrier, threads, here);
  NamedBarrier& b = block().barriers[barrier];
  const int id = self().id;
  add_arrival(b, barrier, here);
  b.expected = count;
  b.here = here;
  b.total += arrival.addend;
  if (kRaceBuild && arrival.orders) race().release(self().agent, b.clock);
  const bool waits = arrival.waits;
  if (waits) b.waiters.push_back(id);
  if (b.arrived >= count) {
    complete(b, barrier, here);
  } else if (waits) {
    wait_for("barrier", here, barrier);
  }
}

}  // namespace

void barrier_sync(int barrier, int threads, Location here) {
  if (takes_part("barrier sync", here)) come(barrier, threads, {}, here);
}

void barrier_arrive(int barrier, int threads, Location here) {
  if (takes_part("barrier arrive", here)) come(barrier, threads, {.waits = false}, here);
}

int barrier_reduce(int predicate, Location here) {
  // Without its result a kernel can't go on: a mutant loses the order alone.
  const bool orders = takes_part("barrier reduce", here);
  come(0, kAllThreads, {.orders = orders, .addend = predicate != 0}, here);
  return block().barriers[0].reduced;
}

}  // namespace simt
