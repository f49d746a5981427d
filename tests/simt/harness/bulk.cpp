// Bulk copies of boxes by tensor maps (TMA): loads that an mbarrier counts down, stores and adds in
// groups that a thread waits for, and the fence between ordinary and asynchronous accesses.
#include <algorithm>
#include <cstring>

#include "harness/memory.h"
#include "harness/race.h"

namespace simt {
namespace {

constexpr int kInFlightByte = 0xfd;  // what shared memory holds until a load happens
constexpr int kChunk = 16;           // what a swizzle moves as one

char* at_shared(const Block& b, uint32_t address) { return b.smem + address - kSharedBase; }

// Calls body(shared, global, bytes) for what of a row's 16-byte chunks is inside of the tensor.
template <class Body>
void for_each_piece(const TensorMap& map, const BoxRow& row, const Body& body) {
  const int element = static_cast<int>(bytes_of(map.element));
  const int first = row.first * element, end = row.end * element;
  for (int begin = first; begin < end;) {
    const int next = std::min(end, begin / kChunk * kChunk + kChunk);
    body(row.offset + begin, row.global + begin - first, next - begin);
    begin = next;
  }
}

uint32_t check_box(const TensorMap& map, uint32_t address, int rank, const char* what,
                   Location here) {
  if (map.rank != rank) {
    fail("%s at %s: %d coordinates for a tensor map of %d dimensions", what,
         to_string(here).c_str(), rank, map.rank);
  }
  const int alignment = rank == 1 ? kChunk : map.swizzle != 0 ? 8 * map.swizzle : 128;
  if (address % alignment) {
    fail("%s at %s: shared address 0x%x is no multiple of %d", what, to_string(here).c_str(),
         address, alignment);
  }
  return checked_shared_offset(address, box_bytes(map), what, here);
}

void check_inside(const TensorMap& map, const std::array<int, kMaxRank>& at, const char* what,
                  Location here) {
  for (const BoxRow& row : rows_of(map, at)) {
    const size_t bytes = size_t{bytes_of(map.element)} * (row.end - row.first);
    if (bytes > 0) checked_global(row.global, bytes, what, here);
  }
}

void note_global(const TensorMap& map, const std::array<int, kMaxRank>& at, const Viewer& viewer,
                 const Epoch& epoch, Kind kind) {
  for (const BoxRow& row : rows_of(map, at)) {
    const uint32_t bytes = bytes_of(map.element) * (row.end - row.first);
    if (bytes > 0) global_async_access(viewer, epoch, row.global, bytes, kind);
  }
}

std::array<int, kMaxRank> coordinates(const int* at, int rank) {
  std::array<int, kMaxRank> found{};
  std::copy_n(at, rank, found.begin());
  return found;
}

void perform(const BulkLoad& load) {
  Block& owner = *cluster().blocks[load.rank_of_block];
  const uint32_t bytes = box_bytes(load.map);
  memset(at_shared(owner, load.shared), 0, bytes);
  for (const BoxRow& row : rows_of(load.map, load.at)) {
    for_each_piece(load.map, row, [&](int64_t offset, const char* global, int count) {
      const auto plain = static_cast<uint32_t>(load.shared + offset);
      const uint32_t chunk = swizzled(plain / kChunk * kChunk, load.map.swizzle);
      memcpy(at_shared(owner, chunk + plain % kChunk), global, count);
    });
  }
  if (kRaceBuild) race().expect_change(owner, at_shared(owner, load.shared), bytes);
  complete_bytes(owner, load.barrier, bytes, load.here);
}

void read_box(BulkStore& store) {
  if (!store.box.empty()) return;
  const char* from = at_shared(block(), store.shared);
  store.box.assign(from, from + box_bytes(store.map));
}

void write_box(BulkStore& store) {
  if (store.written) return;
  store.written = true;
  for (const BoxRow& row : rows_of(store.map, store.at)) {
    for_each_piece(store.map, row, [&](int64_t offset, char* global, int count) {
      const auto plain = static_cast<uint32_t>(store.shared + offset);
      const uint32_t chunk = swizzled(plain / kChunk * kChunk, store.map.swizzle);
      const char* from = store.box.data() + (chunk - store.shared) + plain % kChunk;
      const int element = static_cast<int>(bytes_of(store.map.element));
      store.adds ? add_elements(global, from, count / element, store.map.element)
                 : static_cast<void>(memcpy(global, from, count));
    });
  }
}

void read_oldest(BulkStores& stores) {
  for (BulkStore& store : stores.unread.front().stores) read_box(store);
  stores.unwritten.push_back(std::move(stores.unread.front()));
  stores.unread.erase(stores.unread.begin());
}

void write_oldest(BulkStores& stores) {
  for (BulkStore& store : stores.unwritten.front().stores) write_box(store);
  stores.unwritten.erase(stores.unwritten.begin());
}

// One load into one block: noted, and its destination lost until it happens. A multicast reads
// global memory once: for its first block.
void begin_load(const BulkLoad& load, bool reads) {
  Block& owner = *cluster().blocks[load.rank_of_block];
  MBarrier& m = mbarrier_of(owner, load.barrier, "bulk load", load.here);
  if (!m.fenced) {
    fail("bulk load at %s: the init of its mbarrier at %s was not fenced before the async proxy",
         to_string(load.here).c_str(), to_string(m.here).c_str());
  }
  ++m.loads;
  const uint32_t bytes = box_bytes(load.map);
  counters.bulk_bytes += bytes;
  char* to = at_shared(owner, load.shared);
  if (kRaceBuild) {
    const VectorClock clock = race().clock_at_issue(self().agent);
    const Epoch epoch{static_cast<uint16_t>(race().loads_of(m.agent)),
                      static_cast<uint32_t>(m.phase + 1), load.here};
    const Viewer viewer{clock, -1, true};
    race().access(owner, viewer, epoch, load.shared - kSharedBase, bytes, true);
    const uint64_t read_before = counters.global_read_bytes;
    note_global(load.map, load.at, viewer, epoch, Kind::kRead);
    if (!reads) counters.global_read_bytes = read_before;
    race().expect_change(owner, to, bytes);
  }
  memset(to, kInFlightByte, bytes);
}

// The bytes of a copy without a tensor map, as a map of one dimension and box.
TensorMap line_map(const void* global, uint32_t bytes, const char* what, Location here) {
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (address % kChunk || bytes % kChunk || bytes == 0) {
    fail("%s at %s: %u bytes at 0x%zx of global memory: both must be multiples of %d", what,
         to_string(here).c_str(), bytes, static_cast<size_t>(address), kChunk);
  }
  TensorMap map{};
  map.base = static_cast<char*>(const_cast<void*>(global));
  map.element = Element::kFloat32;
  map.rank = 1;
  std::fill(std::begin(map.sizes), std::end(map.sizes), 1);
  std::fill(std::begin(map.box), std::end(map.box), 1);
  map.sizes[0] = map.box[0] = static_cast<int>(bytes / sizeof(float));
  map.strides[0] = sizeof(float);
  return map;
}

}  // namespace

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Location here) {
  const int start = 0;
  tma_load(shared, line_map(global, bytes, "bulk load", here), barrier, &start, 1, 0, here);
}

void bulk_add(void* global, const void* shared, uint32_t bytes, Location here) {
  const int start = 0;
  tma_store(line_map(global, bytes, "bulk add", here), shared, &start, 1, true, here);
}

void add_floats(float* global, const float* values, int count, Location here) {
  note_atomic(global, count * sizeof(float), here);
  for (int i = 0; i < count; ++i) global[i] += values[i];
}

void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, const int* at, int rank,
              uint32_t blocks, Location here) {
  const uint32_t address = shared_address(shared), barrier_address = shared_address(barrier);
  check_box(map, address, rank, "bulk load", here);
  const BulkLoad load{map, coordinates(at, rank), block().rank, address, barrier_address, here};
  check_inside(map, load.at, "bulk load", here);
  if (blocks == 0) blocks = 1u << block().rank;
  bool reads = true;
  for (int to = 0; to < kMaxClusterBlocks; ++to) {
    if (!(blocks >> to & 1)) continue;
    BulkLoad one = load;
    one.rank_of_block = block_of_rank(to, "bulk load", here).rank;
    begin_load(one, reads);
    reads = false;
    happens_now() ? perform(one) : cluster().loads.push_back(one);
  }
}

bool progress_loads() {
  auto& loads = cluster().loads;
  if (loads.empty()) return false;
  const bool any = config.order == Order::kRandom;
  const auto next = loads.begin() + (any ? block().random() % loads.size() : 0);
  const BulkLoad load = *next;
  loads.erase(next);
  current_block = cluster().blocks[load.rank_of_block].get();
  perform(load);
  return true;
}

void tma_store(const TensorMap& map, const void* shared, const int* at, int rank, bool adds,
               Location here) {
  Fiber& fiber = self();
  const uint32_t address = shared_address(shared);
  const uint32_t offset = check_box(map, address, rank, "bulk store", here);
  BulkStore store{map, coordinates(at, rank), address, adds, here, {}};
  check_inside(map, store.at, "bulk store", here);
  counters.bulk_bytes += box_bytes(map);
  if (kRaceBuild) {
    const VectorClock clock = race().clock_at_issue(fiber.agent);
    const uint32_t time = fiber.stores.committed + 1;
    const Viewer viewer{clock, -1, true};
    race().access(block(), viewer,
                  {static_cast<uint16_t>(race().stores_of(fiber.agent)), time, here}, offset,
                  box_bytes(map), false);
    note_global(map, store.at, viewer,
                {static_cast<uint16_t>(race().results_of(fiber.agent)), time, here},
                adds ? Kind::kAtomic : Kind::kWrite);
  }
  if (happens_now()) {
    read_box(store);
    write_box(store);
  }
  fiber.stores.open.stores.push_back(std::move(store));
}

void bulk_commit(Location here) {
  if (!takes_part("bulk commit", here)) return;
  BulkStores& stores = self().stores;
  stores.unread.push_back(std::move(stores.open));
  stores.open = {};
  ++stores.committed;
}

void bulk_wait(int pending_groups, bool reads_only, Location here) {
  if (!takes_part(reads_only ? "bulk wait read" : "bulk wait", here)) return;
  Fiber& fiber = self();
  BulkStores& stores = fiber.stores;
  const auto pending = static_cast<size_t>(pending_groups);
  while (stores.unread.size() > pending) read_oldest(stores);
  while (!reads_only && stores.unread.size() + stores.unwritten.size() > pending) {
    write_oldest(stores);
  }
  if (!kRaceBuild) return;
  const auto unread = static_cast<uint32_t>(stores.unread.size());
  race().acquire_time(fiber.agent, race().stores_of(fiber.agent), stores.committed - unread);
  if (reads_only) return;
  race().acquire_time(fiber.agent, race().results_of(fiber.agent),
                      stores.committed - unread - static_cast<uint32_t>(stores.unwritten.size()));
}

void finish_stores(Fiber& fiber) {
  while (!fiber.stores.unwritten.empty()) write_oldest(fiber.stores);
}

std::string leftover_stores(const Fiber& fiber) {
  const BulkStores& stores = fiber.stores;
  if (!stores.open.stores.empty()) {
    return "a bulk store that was never committed, issued at " +
           to_string(stores.open.stores[0].here);
  }
  for (const BulkGroup& group : stores.unread) {
    if (group.stores.empty()) continue;
    return "a bulk store whose reads nobody waited for, issued at " +
           to_string(group.stores[0].here);
  }
  return "";
}

void fence_proxy_async(Location here) {
  if (!takes_part("fence.proxy.async", here)) return;
  if (kRaceBuild) race().fence_writes(self().agent);
}

}  // namespace simt
