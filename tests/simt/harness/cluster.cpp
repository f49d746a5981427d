// Clusters: blocks that run together, see each other's shared memory, and meet at a barrier.
#include "harness/race.h"

namespace simt {

Block* block_of(const void* shared) {
  constexpr uintptr_t kRedZone = 1024;  // on both sides of shared memory
  const auto contains = [&](const Block& b) {
    const auto offset =
        reinterpret_cast<uintptr_t>(shared) - (reinterpret_cast<uintptr_t>(b.smem) - kRedZone);
    return offset < b.smem_bytes + 2 * kRedZone;
  };
  if (contains(block())) return &block();
  for (const auto& other : cluster().blocks) {
    if (!contains(*other)) continue;
    if (other->live == 0) fail("access to the shared memory of a block that has ended");
    return other.get();
  }
  return nullptr;
}

Block& block_of_rank(int rank, const char* what, Location here) {
  const int blocks = static_cast<int>(cluster().blocks.size());
  if (rank < 0 || rank >= blocks) {
    fail("%s at %s: block %d of a cluster of %d", what, to_string(here).c_str(), rank, blocks);
  }
  Block& b = *cluster().blocks[rank];
  if (b.live == 0) {
    fail("%s at %s: block %d of the cluster has ended", what, to_string(here).c_str(), rank);
  }
  return b;
}

int cluster_rank() { return block().rank; }

void* cluster_shared(void* shared, int rank, Location here) {
  const uint32_t offset = shared_address(shared) - kSharedBase;
  return block_of_rank(rank, "cluster shared address", here).smem + offset;
}

void cluster_arrive(Location here) {
  if (!takes_part("cluster arrive", here)) return;
  Fiber& fiber = self();
  Cluster& c = cluster();
  if (fiber.cluster_arrivals > fiber.cluster_waits) {
    fail("cluster arrive at %s: the thread has not waited since it last arrived",
         to_string(here).c_str());
  }
  ++fiber.cluster_arrivals;
  if (kRaceBuild) race().release(fiber.agent, c.barrier_arriving);
  const uint64_t threads = uint64_t(block().threads) * c.blocks.size();
  if (++c.barrier_arrivals % threads) return;
  join_clocks(c.barrier_ended, c.barrier_arriving);
  c.barrier_arriving.clear();
  for (Fiber* waiter : c.barrier_waiters) {
    wake(*c.blocks[waiter->agent / block().threads], waiter->id);
  }
  c.barrier_waiters.clear();
}

void cluster_wait(Location here) {
  if (!takes_part("cluster wait", here)) return;
  Fiber& fiber = self();
  Cluster& c = cluster();
  if (fiber.cluster_arrivals == fiber.cluster_waits) {
    fail("cluster wait at %s: the thread has not arrived", to_string(here).c_str());
  }
  ++fiber.cluster_waits;
  const uint64_t threads = uint64_t(block().threads) * c.blocks.size();
  if (c.barrier_arrivals / threads < fiber.cluster_waits) {
    c.barrier_waiters.push_back(&fiber);
    wait_for("cluster wait", here, ~0u);
  }
  if (kRaceBuild) race().acquire(fiber.agent, c.barrier_ended);
}

}  // namespace simt
