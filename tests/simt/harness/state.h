// The state of a running grid: one cluster of blocks at a time (mostly a cluster is one block), the
// threads as fibers, all on one OS thread.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <random>

#include "harness/async.h"
#include "harness/simt.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr int kNamedBarriers = 16;

// What its owner knows of every agent (race.h): the time up to which that one's accesses are
// ordered before the owner's. Empty: of nothing.
struct VectorClock {
  std::vector<uint32_t> known;
  std::vector<uint32_t> fenced;  // likewise, of ordinary writes, before the async proxy's accesses
  void clear() { known.clear(), fenced.clear(); }
};

enum class State : uint8_t { kReady, kWaiting, kDone };

// What a thread waits for, as a deadlock report shows it.
struct Wait {
  const char* kind = "";
  Location here{nullptr, 0};
  uint64_t object = 0, detail = 0;
};

// One cp.async, or the arrival that follows a thread's copies.
struct Copy {
  char* shared;
  const char* global;
  int bytes, source_bytes;
  size_t serial;  // among the thread's copies, from 1
  Location here;
  bool done;
};
struct CopyGroup {
  std::vector<Copy> copies;
};
struct PendingArrival {
  uint32_t barrier;   // shared address
  size_t after_copy;  // serial number of the last copy it waits for
  Location here;
};

struct Fiber : ThreadView {
  int agent = 0;  // among the threads of the cluster
  State state = State::kReady;
  Wait wait;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;

  CopyGroup open_group;
  std::vector<CopyGroup> groups;                                        // oldest first
  std::vector<PendingArrival> arrivals;                                 // oldest first
  size_t copies_issued = 0, copies_tracked = 0, copies_waited_for = 0;  // serial numbers
  uint64_t accesses = 0;  // to memory that others may write, since it was resumed
  BulkStores stores;
  Registers registers;
  uint64_t cluster_arrivals = 0, cluster_waits = 0;
};

// A warp collective that some lanes have reached. Disjoint masks may wait side by side.
struct Collective {
  const char* kind = nullptr;
  uint32_t mask = 0, arrived = 0;
  Location here{nullptr, 0};
  std::array<void*, kWarpSize> records{};
};
struct Warp {
  std::vector<Collective> open;
  uint32_t ready = 0;
  WarpProducts products;
  // Of each thread, by setmaxnreg: has, 0 being what the launch gave; waits for, 0 being nothing.
  int registers = 0, registers_wanted = 0;
  Location registers_set{nullptr, 0};
};

// The lanes of a warp that have arrived in a barrier's phase, and where the first did.
struct Arrivals {
  uint32_t lanes = 0;
  Location here{nullptr, 0};
};
struct NamedBarrier {
  int expected = 0, arrived = 0;  // threads; whole warps, as PTX counts
  int total = 0;                  // of what they add
  int reduced = 0;                // the last phase's total
  Location here{nullptr, 0};
  std::vector<int> waiters;
  std::map<int, Arrivals> of_warp;
  VectorClock clock;
};

// The copies of a thread up to a serial number, which an arrival stands for.
struct TrackedCopies {
  int thread;
  size_t up_to_copy;
};
struct MBarrier {
  uint32_t count = 0;
  int64_t pending = 0;
  int64_t bytes = 0;    // that this phase still expects; below 0 where they came before
  int loads = 0;        // bulk loads of this phase that are under way
  int agent = 0;        // of those loads
  bool fenced = false;  // its init, before the async proxy
  int initialiser = 0;
  uint64_t phase = 0;
  Location here{nullptr, 0}, last_arrival{nullptr, 0};
  std::vector<int> waiters;
  VectorClock arriving, ended;  // of this phase's arrivals so far, of the phases before it
  std::vector<TrackedCopies> copies_arriving, copies_ended;  // likewise
};

struct Cluster;

struct Block : BlockView {
  Block();
  ~Block();
  Cluster* cluster = nullptr;
  int rank = 0;  // in it
  int threads = 0, warps_count = 0, live = 0, cursor = 0;
  int free_registers = 0;  // of the multiprocessor, beside those of the launch
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::array<NamedBarrier, kNamedBarriers> barriers;
  std::map<uint32_t, MBarrier> mbarriers;  // by shared address
  std::mt19937_64 random;
  std::string failure;
  const std::function<void()>* body = nullptr;
};

class RaceDetector;

// Blocks that run at the same time, on one OS thread all the same.
struct Cluster {
  Cluster();
  ~Cluster();
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<BulkLoad> loads;  // under way, oldest first
  int mbarriers = 0;            // initialised so far
  int cursor = 0;
  uint64_t barrier_arrivals = 0;  // all phases of barrier.cluster together
  std::vector<Fiber*> barrier_waiters;
  VectorClock barrier_arriving, barrier_ended;
  std::unique_ptr<RaceDetector> race;  // race build only
};

inline Block& block() { return *static_cast<Block*>(current_block); }
inline Cluster& cluster() { return *block().cluster; }
inline RaceDetector& race() { return *cluster().race; }
// Lanes that the last warp of a block doesn't have belong to no mask.
inline uint32_t existing_lanes(int warp) {
  const int lanes = block().threads - warp * kWarpSize;
  return lanes >= kWarpSize ? ~0u : (1u << lanes) - 1;
}
inline Fiber& self() { return *static_cast<Fiber*>(current_thread); }
inline bool in_kernel() { return current_thread != nullptr; }

// fiber.cpp
void start_fiber(Fiber& fiber);
void resume(Fiber& fiber);
void return_to_scheduler();
void release_stack(Fiber& fiber);

// scheduler.cpp
void wait_for(const char* kind, Location here, uint64_t object = 0, uint64_t detail = 0);
void wake(Block& b, int thread);
bool coin();
bool happens_now();  // whether a copy or product that is issued now is done now

// reports.cpp
std::string deadlock_report(const Block& b);
std::string unfinished(const Block& b);  // what it must not leave behind; empty: nothing

// cp_async.cpp
bool progress_copies();  // completes one copy that somebody may wait for; false: there is none
std::string leftovers(const Fiber& fiber);

// mbarrier.cpp
void arrive_at(Block& owner, uint32_t address, const VectorClock& clock, TrackedCopies copies,
               Location here);
MBarrier& mbarrier_of(Block& owner, uint32_t address, const char* what, Location here);
void complete_bytes(Block& owner, uint32_t address, int64_t bytes, Location here);
std::string unfinished_mbarriers(const Block& b);

// bulk.cpp
bool progress_loads();  // as progress_copies
void finish_stores(Fiber& fiber);
std::string leftover_stores(const Fiber& fiber);

// registers.cpp
int launch_registers(int threads);
std::string uneven_registers(const Block& b);

// wgmma.cpp
std::string leftover_products(const Block& b);

// cluster.cpp
Block* block_of(const void* shared);  // of this cluster; null: in the memory of none
Block& block_of_rank(int rank, const char* what, Location here);

// memory.cpp
uint32_t checked_shared_offset(uint32_t address, uint32_t bytes, const char* what, Location here);

}  // namespace simt
