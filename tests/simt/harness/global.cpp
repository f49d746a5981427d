// Global memory in the race build: conflicts between the blocks of a launch, which nothing orders,
// and between the threads of a block, by their vector clocks.
#include <map>
#include <tuple>

#include "harness/memory.h"
#include "harness/race.h"
#include "harness/transactions.h"

namespace simt {
namespace {

std::vector<Origin> places(1);  // place 0 is unknown

uint16_t new_place(Origin origin) {
  static std::map<std::tuple<const void*, const char*, int>, uint16_t> known;
  const auto key = std::make_tuple(origin.code, origin.here.file, origin.here.line);
  const auto [at, fresh] = known.emplace(key, static_cast<uint16_t>(places.size()));
  if (fresh && places.size() > UINT16_MAX) at->second = 0;
  if (fresh && places.size() <= UINT16_MAX) places.push_back(origin);
  return at->second;
}

uint16_t place_of(Origin origin) {
  if (origin.code == nullptr) return new_place(origin);
  struct Entry {
    const void* code;
    uint16_t place;
  };
  static Entry cache[1024];
  Entry& entry = cache[reinterpret_cast<uintptr_t>(origin.code) % 1024];
  if (entry.code != origin.code) entry = {origin.code, new_place(origin)};
  return entry.place;
}

constexpr uint32_t kManyBlocks = ~0u;

// One access of a thread, or of what works for it.
struct Access {
  const Viewer& viewer;
  bool write;
  Trace trace;
  Origin origin;
};

bool known(const Access& access, const Trace& past, bool written) {
  return past.time == 0 || race().knows(access.viewer, past.agent, past.time, written);
}

[[noreturn]] void report(const char* what, const Access& access, const Trace* other) {
  const std::string one = race().describe(access.trace.agent, access.origin);
  const std::string two =
      other ? "; the other: " + race().describe(other->agent, places[other->place]) : "";
  fail("%s: global memory, %s by %s%s", what, access.write ? "write" : "read", one.c_str(),
       two.c_str());
}

void check_blocks(const Touched& t, uint32_t me, const Access& access) {
  if (t.writer != 0 && t.writer != me) {
    report(access.write ? "two blocks of a launch write the same global memory"
                        : "a block reads global memory that another block of the launch writes",
           access, nullptr);
  }
  if (access.write && t.reader != 0 && t.reader != me) {
    report("a block writes global memory that another block of the launch reads", access, nullptr);
  }
  if (t.adder != 0 && t.adder != me) {
    report("a block uses global memory that another block of the launch adds to", access, nullptr);
  }
}

uint32_t one_or_many(uint32_t before, uint32_t me) {
  return before == 0 || before == me ? me : kManyBlocks;
}

void check_threads(const Touched& t, const Access& access) {
  if (!known(access, t.write, true)) {
    report(access.write ? "two writes without an order (race)"
                        : "read of data whose write is not ordered before it (race)",
           access, &t.write);
  }
  if (!access.write) return;
  for (const Trace& read : t.reads) {
    if (known(access, read, false)) continue;
    report("write to data whose read is not ordered before it (race)", access, &read);
  }
}

// Two readers are kept: that of the same agent or one that is known of goes first, then the older.
void keep_read(Touched& t, const Access& access) {
  const auto replaceable = [&](const Trace& read) {
    return read.agent == access.trace.agent || known(access, read, false);
  };
  if (!replaceable(t.reads[0])) t.reads[1] = t.reads[0];
  t.reads[0] = access.trace;
}

// Calls body(cell, this block, whether nobody of this launch has come before). Two bytes are the
// smallest thing that blocks or threads may own apart.
template <class Body>
void for_each_cell(const Found& found, uintptr_t address, size_t bytes, const Body& body) {
  auto& touched = found.allocation->touched;
  if (touched.empty()) touched.resize((found.allocation->bytes + 1) / 2);
  const uint3 at = block().index;
  const dim3 grid = block().grid;
  const uint32_t me = at.x + grid.x * (at.y + grid.y * at.z) + 1;
  const uint32_t launch = launch_serial();
  const size_t first = (address - found.start) / 2, last = (address - found.start + bytes - 1) / 2;
  for (size_t i = first; i <= last; ++i) {
    Touched& t = touched[i];
    const bool fresh = t.launch != launch;
    if (fresh) t = {launch, 0, 0, 0, {}, {}};
    body(t, me, fresh);
  }
}

void check(const Found& found, uintptr_t address, size_t bytes, const Access& access) {
  for_each_cell(found, address, bytes, [&](Touched& t, uint32_t me, bool fresh) {
    if (!fresh) {
      check_blocks(t, me, access);
      if (t.reader != me) t.reads[0] = t.reads[1] = {};  // of a block before
      check_threads(t, access);
    }
    if (access.write) {
      t.writer = me;
      t.write = access.trace;
      t.reads[0] = t.reads[1] = {};
    } else {
      t.reader = one_or_many(t.reader, me);
      keep_read(t, access);
    }
  });
}

void check_add(const Found& found, uintptr_t address, size_t bytes, Origin origin) {
  for_each_cell(found, address, bytes, [&](Touched& t, uint32_t me, bool) {
    for (const uint32_t other : {t.writer, t.reader}) {
      if (other == 0 || other == me) continue;
      fail("a block adds to global memory that another block of the launch uses, at %s",
           to_string(origin).c_str());
    }
    t.adder = one_or_many(t.adder, me);
  });
}

}  // namespace

void global_access(uintptr_t address, uint32_t bytes, Kind kind, Origin origin) {
  const Found found = find_allocation(address, bytes);
  if (found.kind == Place::kElsewhere) return;  // constants and the kernel's own parameters
  if (found.kind == Place::kRedZone) {
    fail("global %s of %u bytes out of bounds, at %s", name_of(kind), bytes,
         to_string(origin).c_str());
  }
  if (kind != Kind::kWrite) counters.global_read_bytes += bytes;
  if (kind != Kind::kRead) counters.global_write_bytes += bytes;
  count_access(origin, address, bytes, false);
  if (kind == Kind::kAtomic) return check_add(found, address, bytes, origin);
  const int thread = self().agent;
  const Trace trace{race().now(thread), static_cast<uint16_t>(thread), place_of(origin)};
  const Viewer viewer = race().thread_view(thread);
  check(found, address, bytes, {viewer, kind == Kind::kWrite, trace, origin});
}

void global_async_access(const Viewer& viewer, const Epoch& epoch, const void* p, uint32_t bytes,
                         Kind kind) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (kind != Kind::kWrite) counters.global_read_bytes += bytes;
  if (kind != Kind::kRead) counters.global_write_bytes += bytes;
  if (!viewer.async) count_access(epoch.origin, address, bytes, false);
  const Found found = find_allocation(address, bytes);
  if (kind == Kind::kAtomic) return check_add(found, address, bytes, epoch.origin);
  const Trace trace{epoch.time, epoch.agent, place_of(epoch.origin)};
  check(found, address, bytes, {viewer, kind == Kind::kWrite, trace, epoch.origin});
}

}  // namespace simt
