// Runs a grid: block after block, and in a block one ready thread after another.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "harness/arena.h"
#include "harness/memory.h"
#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {

ThreadView* current_thread;
BlockView* current_block;
Config config;
Counters counters;

Block::Block() = default;
Block::~Block() {
  for (auto& fiber : fibers) release_stack(*fiber);
}

std::string to_string(Location location) {
  if (location.file == nullptr) return "?";
  const char* slash = strrchr(location.file, '/');
  return std::string(slash ? slash + 1 : location.file) + ":" + std::to_string(location.line);
}

bool same_place(Location a, Location b) {
  return a.line == b.line && a.file != nullptr && b.file != nullptr && !strcmp(a.file, b.file);
}

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (current_block == nullptr) throw Error(text);
  const uint3 at = block().index;
  char place[160];
  if (!in_kernel()) {  // a copy that the scheduler completes
    snprintf(place, sizeof place, "  [block (%u, %u, %u)]", at.x, at.y, at.z);
    throw Error(std::string(text) + place);
  }
  const Fiber& fiber = self();
  snprintf(place, sizeof place, "  [block (%u, %u, %u), thread %d = warp %d lane %d]", at.x, at.y,
           at.z, fiber.id, fiber.warp, fiber.lane);
  block().failure = std::string(text) + place;
  // Compilers take instrumented loads and stores for calls that can't throw, so no exception may
  // start here: the thread is left where it is.
  for (;;) return_to_scheduler();
}

void wait_for(const char* kind, Location here, uint64_t object, uint64_t detail) {
  Fiber& fiber = self();
  fiber.state = State::kWaiting;
  fiber.wait = {kind, here, object, detail};
  block().warps[fiber.warp].ready &= ~(1u << fiber.lane);
  return_to_scheduler();
}

void wake(int thread) {
  Fiber& fiber = *block().fibers[thread];
  if (fiber.state != State::kWaiting) return;
  fiber.state = State::kReady;
  block().warps[fiber.warp].ready |= 1u << fiber.lane;
}

bool coin() { return block().random() & 1; }

namespace {

std::set<const void*> launched;

// The next ready thread at or after `first`, in the order of ids; -1: none before `end`.
int ready_from(const Block& b, int first, int end) {
  for (int warp = first / kWarpSize; warp * kWarpSize < end; ++warp) {
    uint32_t ready = b.warps[warp].ready;
    if (warp == first / kWarpSize) ready &= ~0u << first % kWarpSize;
    if (ready == 0) continue;
    const int thread = warp * kWarpSize + __builtin_ctz(ready);
    return thread < end ? thread : -1;
  }
  return -1;
}

int last_ready(const Block& b) {
  for (int warp = b.warps_count - 1; warp >= 0; --warp) {
    if (b.warps[warp].ready) return warp * kWarpSize + 31 - __builtin_clz(b.warps[warp].ready);
  }
  return -1;
}

int random_ready(Block& b) {
  const int start = static_cast<int>(b.random() % b.threads);
  const int after = ready_from(b, start, b.threads);
  return after >= 0 ? after : ready_from(b, 0, start);
}

int next_thread(Block& b) {
  switch (config.order) {
    case Order::kReverse: return last_ready(b);
    case Order::kFirst: return ready_from(b, 0, b.threads);
    case Order::kRandom: return random_ready(b);
    case Order::kRoundRobin: break;
  }
  int thread = ready_from(b, b.cursor, b.threads);
  if (thread < 0) thread = ready_from(b, 0, b.cursor);
  if (thread >= 0) b.cursor = (thread + 1) % b.threads;
  return thread;
}

std::string describe_wait(const Block& b, const Fiber& fiber) {
  const Wait& wait = fiber.wait;
  const std::string here = to_string(wait.here);
  char text[320];
  if (fiber.state == State::kDone) return "has ended";
  if (!strcmp(wait.kind, "mbarrier wait")) {
    const MBarrier& m = b.mbarriers.at(static_cast<uint32_t>(wait.object));
    snprintf(text, sizeof text,
             "mbarrier wait at %s: smem+0x%x parity %d (phase %d, %d of %u arrivals missing; "
             "init at %s)",
             here.c_str(), static_cast<uint32_t>(wait.object) - kSharedBase,
             static_cast<int>(wait.detail), static_cast<int>(m.phase), static_cast<int>(m.pending),
             m.count, to_string(m.here).c_str());
  } else if (!strcmp(wait.kind, "barrier")) {
    const NamedBarrier& n = b.barriers[wait.object];
    snprintf(text, sizeof text, "barrier %d at %s (%d of %d threads have arrived)",
             static_cast<int>(wait.object), here.c_str(), n.arrived, n.expected);
  } else {
    snprintf(text, sizeof text, "%s at %s, mask %08x", wait.kind, here.c_str(),
             static_cast<uint32_t>(wait.object));
  }
  return text;
}

std::string deadlock_report(const Block& b) {
  char line[400];
  snprintf(line, sizeof line, "deadlock in block (%u, %u, %u):", b.index.x, b.index.y, b.index.z);
  std::string report = line;
  for (int warp = 0; warp < b.warps_count; ++warp) {
    std::map<std::string, uint32_t> lanes_of;
    for (int lane = 0; lane < kWarpSize && warp * kWarpSize + lane < b.threads; ++lane) {
      lanes_of[describe_wait(b, *b.fibers[warp * kWarpSize + lane])] |= 1u << lane;
    }
    for (const auto& [what, lanes] : lanes_of) {
      snprintf(line, sizeof line, "\n  warp %d lanes %08x: %s", warp, lanes, what.c_str());
      report += line;
    }
  }
  return report;
}

// What a kernel must not leave behind; empty: nothing.
std::string unfinished(const Block& b) {
  for (const Warp& warp : b.warps) {
    for (const Collective& c : warp.open) {
      return std::string("block ended while lanes wait in ") + c.kind + " at " + to_string(c.here);
    }
  }
  for (int i = 0; i < kNamedBarriers; ++i) {
    if (b.barriers[i].arrived == 0) continue;
    return "block ended with " + std::to_string(b.barriers[i].arrived) + " arrivals at barrier " +
           std::to_string(i) + ", last at " + to_string(b.barriers[i].here);
  }
  for (const auto& [address, m] : b.mbarriers) {
    const std::string overwritten = overwritten_since_init(b, address, m);
    if (!overwritten.empty()) return "block ended: " + overwritten;
    if (m.pending == m.count) continue;
    char text[320];
    snprintf(text, sizeof text,
             "block ended with %d of %u arrivals in a phase of the mbarrier at smem+0x%x, init at "
             "%s, the last arrival at %s",
             static_cast<int>(m.count - m.pending), m.count, address - kSharedBase,
             to_string(m.here).c_str(), to_string(m.last_arrival).c_str());
    return text;
  }
  for (const auto& fiber : b.fibers) {
    const std::string left = leftovers(*fiber);
    if (!left.empty()) return "thread " + std::to_string(fiber->id) + " ended with " + left;
  }
  return "";
}

void run_threads(Block& b) {
  while (b.live > 0 && b.failure.empty()) {
    const int thread = next_thread(b);
    if (thread >= 0) {
      resume(*b.fibers[thread]);
    } else if (!progress_copies()) {
      b.failure = deadlock_report(b);
    }
  }
}

void run_block(Block& b) {
  try {
    run_threads(b);
  } catch (const Error& error) {  // of what no thread was running for
    b.failure = error.what();
  }
  if (b.failure.empty()) b.failure = unfinished(b);
  if (b.failure.empty() && b.race) b.failure = b.race->end_block();
  for (int warp = 0; warp < b.warps_count; ++warp) flush_transactions(warp);
}

void make_threads(Block& b) {
  for (int id = 0; id < b.threads; ++id) {
    auto fiber = std::make_unique<Fiber>();
    const unsigned x = id % b.size.x, y = id / b.size.x % b.size.y, z = id / b.size.x / b.size.y;
    fiber->index = {x, y, z};
    fiber->id = id;
    fiber->warp = id / kWarpSize;
    fiber->lane = id % kWarpSize;
    start_fiber(*fiber);
    b.warps[fiber->warp].ready |= 1u << fiber->lane;
    b.fibers.push_back(std::move(fiber));
  }
}

// The block that kernels see, for as long as it runs.
struct Running {
  explicit Running(Block& b) { current_block = &b; }
  ~Running() {
    current_block = nullptr;
    current_thread = nullptr;
  }
};

std::string run_one(uint64_t id, dim3 grid, dim3 size, Arena& arena,
                    const std::function<void()>& body) {
  Block b;
  b.index = {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
             static_cast<unsigned>(id / grid.x / grid.y)};
  b.size = size;
  b.grid = grid;
  b.threads = b.live = static_cast<int>(size.x * size.y * size.z);
  b.warps_count = (b.threads + kWarpSize - 1) / kWarpSize;
  b.warps.resize(b.warps_count);
  b.random.seed(config.seed * 1000003 + id);
  arena.poison();
  b.smem = arena.data();
  b.smem_bytes = arena.bytes();
  b.body = &body;
  if (kRaceBuild) b.race = std::make_unique<RaceDetector>(b);
  const Running running(b);
  make_threads(b);
  run_block(b);
  ++counters.blocks;
  return b.failure;
}

}  // namespace

std::vector<std::string> kernels_run() {
  std::vector<std::string> names;
  for (const void* kernel : launched) names.push_back(function_name(kernel));
  return names;
}

void run_grid(const void* kernel, dim3 grid, dim3 size, size_t smem_bytes,
              const std::function<void()>& body) {
  const auto nobody_frees = lock_allocations();
  launched.insert(kernel);
  if (current_block != nullptr) fail("a launch inside of a kernel");
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (smem_bytes > config.max_smem_bytes) {
    fail("%zu bytes of dynamic shared memory, at most %u", smem_bytes, config.max_smem_bytes);
  }
  if (threads < 1 || threads > 1024 || size.z > 64) {
    fail("a block of %u x %u x %u threads", size.x, size.y, size.z);
  }
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  ++counters.launches;
  begin_launch();
  Arena arena(smem_bytes);
  std::vector<uint64_t> ids(blocks);
  for (uint64_t i = 0; i < blocks; ++i) ids[i] = i;
  if (config.order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  if (config.seed != 0) std::shuffle(ids.begin(), ids.end(), std::mt19937_64(config.seed));
  for (uint64_t id : ids) {
    const std::string failure = run_one(id, grid, size, arena, body);
    if (!failure.empty()) throw Error(failure);
  }
}

}  // namespace simt
