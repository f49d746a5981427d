// A happens-before race detector for shared memory: vector clocks of threads and of what copies on
// their behalf, against the last write and the reads since of every two bytes.
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

class RaceDetector {
 public:
  explicit RaceDetector(const Block& block);

  // Happens-before edges. Releasing starts a new time for the thread.
  void synchronise_lanes(int warp, uint32_t mask);
  void release(int thread, VectorClock& into);
  void acquire(int thread, const VectorClock& from);
  void release_copies(int thread, size_t up_to_copy, VectorClock& into);
  void acquire_copies(int thread, size_t up_to_copy);

  // Accesses to shared memory; a conflict ends the launch.
  void thread_access(int thread, uint32_t offset, uint32_t bytes, bool write, Origin origin);
  void copy_access(int thread, size_t serial, uint32_t offset, uint32_t bytes, Origin origin);

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
  int copies_of(int thread) const { return threads_ + thread; }
  Cell& cell(uint32_t index);
  void access(const Epoch& epoch, int thread, uint32_t offset, uint32_t bytes, bool write);
  bool knows(int thread, const Epoch& past) const;
  std::string unseen_store(const std::string& until);
  [[noreturn]] void report(const char* what, uint32_t offset, bool write, const Epoch& one,
                           const Epoch* other) const;
  std::string describe(const Epoch& epoch) const;

  const Block& block_;
  int threads_;
  std::vector<uint32_t> now_;        // every thread's own time
  std::vector<VectorClock> clocks_;  // what every thread knows of the others
  std::vector<char> snapshot_;       // of shared memory, when it was last checked
  std::string checked_at_ = "the start of the block";
};

}  // namespace simt
