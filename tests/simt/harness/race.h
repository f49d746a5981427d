// A happens-before race detector: vector clocks of threads and of what copies on their behalf,
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

class RaceDetector {
 public:
  explicit RaceDetector(const Block& block);

  // Happens-before edges. Releasing starts a new time for the thread.
  void synchronise_lanes(int warp, uint32_t mask);
  void release(int thread, VectorClock& into);
  void acquire(int thread, const VectorClock& from);
  void release_copies(int thread, size_t up_to_copy, VectorClock& into);
  void acquire_copies(int thread, size_t up_to_copy);

  // Agents are threads, and behind them the copies of each. A thread knows its own past, but its
  // copies are not ordered among themselves.
  int copies_of(int thread) const { return threads_ + thread; }
  uint32_t now(int thread) const { return now_[thread]; }
  bool knows(int thread, int agent, uint32_t time) const {
    if (agent == thread) return true;
    const VectorClock& known = clocks_[thread];
    const auto index = static_cast<size_t>(agent);
    return index < known.size() && time <= known[index];
  }
  std::string describe(int agent, Origin origin) const;

  // Accesses to shared memory; a conflict ends the launch.
  void thread_access(int thread, uint32_t offset, uint32_t bytes, bool write, Origin origin);
  void copy_access(int thread, size_t serial, uint32_t offset, uint32_t bytes, Origin origin);
  void atomic_access(int thread, uint32_t offset, uint32_t bytes, Origin origin);  // no conflicts

  // Shared memory that changed without an access that was seen: the hooks miss the store of an
  // aggregate that a call returns, and such a store must not hide a race.
  void check_unseen_stores(Location barrier);
  void expect_change(const void* shared, uint32_t bytes);  // without a new access
  std::string end_block();

 private:
  struct Epoch {
    uint16_t agent;
    uint32_t time;
    Origin origin;
  };
  struct Cell {  // two bytes
    uint32_t block_serial = 0;
    bool written = false, stored = false;
    Epoch write{};
    std::vector<Epoch> reads;
  };
  Cell& cell(uint32_t index);
  void access(const Epoch& epoch, int thread, uint32_t offset, uint32_t bytes, bool write);
  bool knows(int thread, const Epoch& past) const { return knows(thread, past.agent, past.time); }
  std::string unseen_store(const std::string& until);
  [[noreturn]] void report(const char* what, uint32_t offset, bool write, const Epoch& one,
                           const Epoch* other) const;

  const Block& block_;
  int threads_;
  std::vector<uint32_t> now_;        // every thread's own time
  std::vector<VectorClock> clocks_;  // what every thread knows of the others
  std::vector<char> snapshot_;       // of shared memory, when it was last checked
  std::string checked_at_ = "the start of the block";
};

// Accesses to global memory (global.cpp), of the running thread and of its copies.
void global_access(uintptr_t address, uint32_t bytes, Kind kind, Origin origin);
void global_copy_access(size_t serial, const void* p, uint32_t bytes, Location here);

}  // namespace simt
