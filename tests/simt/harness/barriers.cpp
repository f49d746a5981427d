// Barriers of a block: __syncthreads, bar.sync, bar.arrive, __syncthreads_count.
#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {
namespace {

int checked_count(int barrier, int threads, Location here) {
  if (barrier < 0 || barrier >= kNamedBarriers) {
    fail("barrier %d at %s: there are %d", barrier, to_string(here).c_str(), kNamedBarriers);
  }
  const int count = threads == kAllThreads ? block().threads : threads;
  if (count != block().threads && (count <= 0 || count % kWarpSize || count > block().threads)) {
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

// One instruction of a warp: its lanes may not come by two ways.
void check_converged(NamedBarrier& b, int barrier, Location here) {
  const Location first = b.of_warp.emplace(self().warp, here).first->second;
  if (same_place(first, here)) return;
  fail("lanes of a warp part: barrier %d at %s, but other lanes came to it at %s", barrier,
       to_string(here).c_str(), to_string(first).c_str());
}

// Only warps that wait here have met: others may be between two accesses.
void complete(NamedBarrier& b, Location here) {
  Block& all = block();
  int met = -1;
  for (int thread : b.waiters) {
    if (kRaceBuild) all.race->acquire(thread, b.clock);
    wake(thread);
    if (thread / kWarpSize != met) flush_transactions(met = thread / kWarpSize);
  }
  if (&b == &all.barriers[0]) all.reduced = b.total;
  b.waiters.clear();
  b.of_warp.clear();
  b.clock.clear();
  const bool everybody = b.expected == all.threads;
  b.arrived = b.expected = b.total = 0;
  if (kRaceBuild && everybody) all.race->check_unseen_stores(here);
}

void come(int barrier, int threads, bool waits, int addend, Location here) {
  const int count = checked_count(barrier, threads, here);
  NamedBarrier& b = block().barriers[barrier];
  const int id = self().id;
  for (int waiter : b.waiters) {
    if (waiter == id)
      fail("barrier %d at %s: the thread waits already", barrier, to_string(here).c_str());
  }
  check_converged(b, barrier, here);
  b.expected = count;
  b.here = here;
  b.total += addend;
  ++b.arrived;
  if (kRaceBuild) block().race->release(id, b.clock);
  if (waits) b.waiters.push_back(id);
  if (b.arrived == count) {
    complete(b, here);
  } else if (waits) {
    wait_for("barrier", here, barrier);
  }
}

}  // namespace

void barrier_sync(int barrier, int threads, Location here) {
  if (takes_part("barrier sync", here)) come(barrier, threads, true, 0, here);
}

void barrier_arrive(int barrier, int threads, Location here) {
  if (takes_part("barrier arrive", here)) come(barrier, threads, false, 0, here);
}

int barrier_reduce(int predicate, Location here) {
  come(0, kAllThreads, true, predicate != 0, here);
  return block().reduced;
}

}  // namespace simt
