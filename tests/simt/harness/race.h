// A happens-before race detector: vector clocks of threads and of what works on their behalf,
// against the last write and the reads since of every two bytes of shared memory. global.cpp asks
// the same clocks about global memory.
#pragma once

#include "harness/state.h"

namespace simt {

// Where an access stands in the source: a location, or an address in the kernel's code.
struct Origin {
  Location here{nullptr, 0};
  const void* code = nullptr;
  Origin(Location here) : here(here) {}
  explicit Origin(const void* code) : code(code) {}
  Origin() = default;
};
std::string to_string(Origin origin);
std::string function_name(const void* code);

void join_clocks(VectorClock& into, const VectorClock& other);
void raise_time(VectorClock& clock, int agent, uint32_t time);

enum class Kind { kRead, kWrite, kAtomic };
const char* name_of(Kind kind);

// Who makes an access, as the detector knows them, and what is ordered before it. An asynchronous
// access sees ordinary writes only through a proxy fence.
struct Viewer {
  const VectorClock& clock;
  int self = -1;  // the agent whose own past it knows; -1: nobody's
  bool async = false;
};
// When an access is made, on which agent's clock.
struct Epoch {
  uint16_t agent;
  uint32_t time;
  Origin origin;
};

class RaceDetector {
 public:
  explicit RaceDetector(const Cluster& cluster);

  // Happens-before edges. Releasing starts a new time for the thread.
  void synchronise_lanes(int first_agent, uint32_t mask);
  void release(int thread, VectorClock& into);
  void acquire(int thread, const VectorClock& from);
  void release_copies(int thread, size_t up_to_copy, VectorClock& into);
  void acquire_time(int thread, int agent, uint32_t time);
  void fence_writes(int thread);  // its own so far, before asynchronous accesses

  // Agents are threads, and behind them what works for them. A thread knows its own past; what
  // works for it is not ordered in itself, but known up to a time.
  int products_of(int warp) const { return threads_ + warp; }
  int loads_of(int mbarrier) const;
  int copies_of(int thread) const { return first_copies_ + thread; }
  int stores_of(int thread) const { return copies_of(thread) + threads_; }   // their reads
  int results_of(int thread) const { return stores_of(thread) + threads_; }  // their writes
  uint32_t now(int thread) const { return now_[thread]; }
  Viewer thread_view(int thread) const { return {clocks_[thread], thread, false}; }
  VectorClock clock_at_issue(int thread) const;  // for what it starts now
  VectorClock clock_at_issue_of_warp(int first_agent) const;
  bool knows(const Viewer& viewer, int agent, uint32_t time, bool written) const;
  std::string describe(int agent, Origin origin) const;

  // Accesses to shared memory of a block; a conflict ends the launch.
  void access(const Block& owner, const Viewer& viewer, const Epoch& epoch, uint32_t offset,
              uint32_t bytes, bool write);
  void thread_access(const Block& owner, uint32_t offset, uint32_t bytes, bool write,
                     Origin origin);  // of the running thread
  void atomic_access(const Block& owner, uint32_t offset, uint32_t bytes, Origin origin);

  // Shared memory that changed without an access that was seen: the hooks miss the store of an
  // aggregate that a call returns, and such a store must not hide a race.
  void check_unseen_stores(const Block& b, Location barrier);
  void expect_change(const Block& owner, const void* shared, uint32_t bytes);
  std::string end_block(const Block& b);

 private:
  struct Cell {  // two bytes
    uint32_t cluster_serial = 0;
    bool written = false, stored = false;
    Epoch write{};
    std::vector<Epoch> reads;
  };
  struct Snapshot {  // of shared memory, when it was last checked
    std::vector<char> bytes;
    std::string checked_at = "the start of the block";
  };
  Cell& cell(const Block& owner, uint32_t index);
  std::string unseen_store(const Block& b, const std::string& until);
  bool is_ordinary(int agent) const {
    return agent < threads_ || (agent >= first_copies_ && agent < first_copies_ + threads_);
  }
  [[noreturn]] void report(const char* what, const Block& owner, uint32_t offset, bool write,
                           const Epoch& one, const Epoch* other) const;

  const Cluster& cluster_;
  int threads_, first_loads_, first_copies_;
  std::vector<uint32_t> now_;        // every thread's own time
  std::vector<VectorClock> clocks_;  // what every thread knows of the others
  std::vector<Snapshot> snapshots_;  // by rank
};

// Accesses to global memory (global.cpp): of the running thread, of what works for one.
void global_access(uintptr_t address, uint32_t bytes, Kind kind, Origin origin);
void global_async_access(const Viewer& viewer, const Epoch& epoch, const void* p, uint32_t bytes,
                         Kind kind);

// To the running thread's registers that products have used (wgmma.cpp).
void on_register_access(const void* p, uint32_t bytes, bool write, Origin origin);

}  // namespace simt
