// Runs a grid: cluster after cluster, and in a cluster one ready thread after another.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
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
Cluster::Cluster() = default;
Cluster::~Cluster() = default;

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

void wake(Block& b, int thread) {
  Fiber& fiber = *b.fibers[thread];
  if (fiber.state != State::kWaiting) return;
  fiber.state = State::kReady;
  b.warps[fiber.warp].ready |= 1u << fiber.lane;
}

bool coin() { return block().random() & 1; }

bool happens_now() {
  return config.timing == Timing::kEager || (config.timing == Timing::kRandom && coin());
}

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

// Runs the next thread of a cluster until it waits. False: none is ready.
bool run_next(Cluster& c) {
  const int blocks = static_cast<int>(c.blocks.size());
  const int first = config.order == Order::kRandom && blocks > 1
                        ? static_cast<int>(c.blocks[0]->random() % blocks)
                        : c.cursor;
  for (int i = 0; i < blocks; ++i) {
    Block& b = *c.blocks[(first + i) % blocks];
    const int thread = next_thread(b);
    if (thread < 0) continue;
    if (config.order == Order::kRoundRobin) c.cursor = (first + i + 1) % blocks;
    current_block = &b;
    resume(*b.fibers[thread]);
    return true;
  }
  return false;
}

std::string run_threads(Cluster& c) {
  const auto alive = [](const auto& b) { return b->live > 0; };
  while (std::any_of(c.blocks.begin(), c.blocks.end(), alive)) {
    if (run_next(c)) {
      if (!block().failure.empty()) return block().failure;
      if (config.timing == Timing::kRandom && !c.loads.empty() && coin()) progress_loads();
    } else if (!progress_copies() && !progress_loads()) {
      std::string report;
      for (const auto& b : c.blocks) report += (report.empty() ? "" : "\n") + deadlock_report(*b);
      return report;
    }
  }
  return "";
}

// All blocks end together: what one leaves behind may be another's.
std::string finish(Cluster& c) {
  if (!c.loads.empty()) {
    return "the cluster ended while the bulk load of " + to_string(c.loads[0].here) +
           " was under way";
  }
  for (const auto& b : c.blocks) {
    current_block = b.get();
    const std::string left = unfinished(*b);
    if (!left.empty()) return left;
    for (const auto& fiber : b->fibers) finish_stores(*fiber);
    const std::string unseen = c.race ? c.race->end_block(*b) : "";
    if (!unseen.empty()) return unseen;
    for (int warp = 0; warp < b->warps_count; ++warp) flush_transactions(warp);
  }
  return "";
}

std::string run_cluster(Cluster& c) {
  try {
    const std::string failure = run_threads(c);
    return failure.empty() ? finish(c) : failure;
  } catch (const Error& error) {  // of what no thread was running for
    return error.what();
  }
}

void make_threads(Block& b) {
  for (int id = 0; id < b.threads; ++id) {
    auto fiber = std::make_unique<Fiber>();
    const unsigned x = id % b.size.x, y = id / b.size.x % b.size.y, z = id / b.size.x / b.size.y;
    fiber->index = {x, y, z};
    fiber->id = id;
    fiber->warp = id / kWarpSize;
    fiber->lane = id % kWarpSize;
    fiber->agent = b.rank * b.threads + id;
    start_fiber(*fiber);
    b.warps[fiber->warp].ready |= 1u << fiber->lane;
    b.fibers.push_back(std::move(fiber));
  }
}

// The block that kernels see, for as long as one runs.
struct Running {
  ~Running() {
    current_block = nullptr;
    current_thread = nullptr;
  }
};

using Arenas = std::vector<std::unique_ptr<Arena>>;

std::unique_ptr<Block> make_block(uint64_t id, dim3 grid, dim3 size, Arena& arena) {
  auto made = std::make_unique<Block>();
  Block& b = *made;
  b.index = {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
             static_cast<unsigned>(id / grid.x / grid.y)};
  b.size = size;
  b.grid = grid;
  b.threads = b.live = static_cast<int>(size.x * size.y * size.z);
  b.warps_count = (b.threads + kWarpSize - 1) / kWarpSize;
  b.warps.resize(b.warps_count);
  b.free_registers = 64 * 1024 - b.threads * launch_registers(b.threads);
  b.random.seed(config.seed * 1000003 + id);
  arena.poison();
  b.smem = arena.data();
  b.smem_bytes = arena.bytes();
  return made;
}

// The blocks from `first_id` on, one per arena.
std::string run_blocks(uint64_t first_id, dim3 grid, dim3 size, const Arenas& arenas,
                       const std::function<void()>& body) {
  Cluster c;
  const Running running;
  for (size_t rank = 0; rank < arenas.size(); ++rank) {
    c.blocks.push_back(make_block(first_id + rank, grid, size, *arenas[rank]));
    Block& b = *c.blocks.back();
    b.cluster = &c;
    b.rank = static_cast<int>(rank);
    b.body = &body;
    current_block = &b;
    make_threads(b);
    ++counters.blocks;
  }
  if (kRaceBuild) c.race = std::make_unique<RaceDetector>(c);
  return run_cluster(c);
}

}  // namespace

std::vector<std::string> kernels_run() {
  std::vector<std::string> names;
  for (const void* kernel : launched) names.push_back(function_name(kernel));
  return names;
}

void run_grid(const void* kernel, dim3 grid, dim3 size, size_t smem_bytes, int cluster,
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
  if (cluster < 1 || cluster > kMaxClusterBlocks || grid.x % cluster) {
    fail("clusters of %d blocks in a grid of %u along x", cluster, grid.x);
  }
  ++counters.launches;
  begin_launch();
  Arenas arenas;
  for (int i = 0; i < cluster; ++i) arenas.push_back(std::make_unique<Arena>(smem_bytes));
  std::vector<uint64_t> ids(blocks / cluster);
  for (uint64_t i = 0; i < ids.size(); ++i) ids[i] = i * cluster;
  if (config.order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  if (config.seed != 0) std::shuffle(ids.begin(), ids.end(), std::mt19937_64(config.seed));
  for (uint64_t id : ids) {
    const std::string failure = run_blocks(id, grid, size, arenas, body);
    if (!failure.empty()) throw Error(failure);
  }
}

}  // namespace simt
