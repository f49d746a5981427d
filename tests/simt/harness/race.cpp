#include "harness/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

constexpr uint32_t kCellBytes = 2;

constexpr int kMBarriers = 64;  // of a block, as far as their loads are told apart

uint32_t cluster_serial;  // cells of earlier ones count as untouched, without being cleared

void join_times(std::vector<uint32_t>& into, const std::vector<uint32_t>& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void raise_entry(std::vector<uint32_t>& times, int agent, uint32_t time) {
  if (times.size() <= static_cast<size_t>(agent)) times.resize(agent + 1, 0);
  times[agent] = std::max(times[agent], time);
}

}  // namespace

void join_clocks(VectorClock& into, const VectorClock& other) {
  join_times(into.known, other.known);
  join_times(into.fenced, other.fenced);
}

void raise_time(VectorClock& clock, int agent, uint32_t time) {
  raise_entry(clock.known, agent, time);
}

namespace {

// The lines that addr2line prints for an address in the module that holds it.
std::vector<std::string> addr2line(const char* options, const void* code, ptrdiff_t shift) {
  std::vector<std::string> lines;
  Dl_info info;
  if (!dladdr(code, &info) || info.dli_fname == nullptr) return lines;
  const auto offset =
      static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) + shift;
  char command[1024];
  snprintf(command, sizeof command, "addr2line %s -e '%s' 0x%lx 2>/dev/null", options,
           info.dli_fname, static_cast<unsigned long>(offset));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return lines;
  char line[2048];
  while (fgets(line, sizeof line, pipe)) {
    line[strcspn(line, "\n")] = 0;
    lines.push_back(line);
  }
  pclose(pipe);
  return lines;
}

}  // namespace

// The innermost inlined function first, then who called it. The address is that of a return.
std::string to_string(Origin origin) {
  if (origin.code == nullptr) return to_string(origin.here);
  static std::map<const void*, std::string> known;
  std::string& text = known[origin.code];
  if (!text.empty()) return text;
  for (const std::string& line : addr2line("-s -i", origin.code, -1)) {
    const std::string place = line.substr(0, line.find(' '));  // "(discriminator 2)" may follow
    text += text.empty() ? place : " in " + place;
  }
  if (text.empty()) text = "?";
  return text;
}

const char* name_of(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
}

std::string function_name(const void* code) {
  const auto lines = addr2line("-f -C", code, 0);
  return lines.empty() ? "?" : lines[0];
}

RaceDetector::RaceDetector(const Cluster& cluster) : cluster_(cluster) {
  const Block& b = *cluster.blocks[0];
  const int blocks = static_cast<int>(cluster.blocks.size());
  threads_ = blocks * b.threads;
  first_loads_ = threads_ + blocks * b.warps_count;
  first_copies_ = first_loads_ + blocks * kMBarriers;
  now_.assign(threads_, 1);
  clocks_.resize(threads_);
  for (const auto& one : cluster.blocks) {
    snapshots_.push_back({{one->smem, one->smem + one->smem_bytes}});
  }
  ++cluster_serial;
}

int RaceDetector::loads_of(int mbarrier) const {
  if (first_loads_ + mbarrier >= first_copies_) fail("more than %d mbarriers a block", kMBarriers);
  return first_loads_ + mbarrier;
}

RaceDetector::Cell& RaceDetector::cell(const Block& owner, uint32_t index) {
  static std::vector<std::vector<Cell>> all(kMaxClusterBlocks);
  std::vector<Cell>& cells = all[owner.rank];
  if (index >= cells.size()) cells.resize(owner.smem_bytes / kCellBytes + 1);
  Cell& c = cells[index];
  if (c.cluster_serial != cluster_serial) {
    c.cluster_serial = cluster_serial;
    c.written = c.stored = false;
    c.reads.clear();
  }
  return c;
}

void RaceDetector::synchronise_lanes(int first_agent, uint32_t mask) {
  VectorClock all;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) release(first_agent + lane, all);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) clocks_[first_agent + lane] = all;
  }
}

void RaceDetector::release(int thread, VectorClock& into) {
  join_clocks(into, clocks_[thread]);
  raise_time(into, thread, now_[thread]++);
}

void RaceDetector::acquire(int thread, const VectorClock& from) {
  join_clocks(clocks_[thread], from);
}

void RaceDetector::release_copies(int thread, size_t up_to_copy, VectorClock& into) {
  raise_time(into, copies_of(thread), static_cast<uint32_t>(up_to_copy));
}

void RaceDetector::acquire_time(int thread, int agent, uint32_t time) {
  raise_time(clocks_[thread], agent, time);
}

void RaceDetector::fence_writes(int thread) {
  VectorClock& clock = clocks_[thread];
  raise_entry(clock.fenced, thread, now_[thread]++);
  const auto copies = static_cast<size_t>(copies_of(thread));
  if (copies < clock.known.size())
    raise_entry(clock.fenced, copies_of(thread), clock.known[copies]);
}

VectorClock RaceDetector::clock_at_issue(int thread) const {
  VectorClock clock = clocks_[thread];
  raise_time(clock, thread, now_[thread]);
  return clock;
}

VectorClock RaceDetector::clock_at_issue_of_warp(int first_agent) const {
  VectorClock clock;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    join_clocks(clock, clocks_[first_agent + lane]);
    raise_time(clock, first_agent + lane, now_[first_agent + lane]);
  }
  return clock;
}

bool RaceDetector::knows(const Viewer& viewer, int agent, uint32_t time, bool written) const {
  if (agent == viewer.self) return true;
  const bool through_fence = viewer.async && written && is_ordinary(agent);
  const auto& times = through_fence ? viewer.clock.fenced : viewer.clock.known;
  const auto index = static_cast<size_t>(agent);
  return index < times.size() && time <= times[index];
}

void RaceDetector::thread_access(const Block& owner, uint32_t offset, uint32_t bytes, bool write,
                                 Origin origin) {
  const int thread = self().agent;
  access(owner, thread_view(thread), {static_cast<uint16_t>(thread), now_[thread], origin}, offset,
         bytes, write);
}

void RaceDetector::atomic_access(const Block& owner, uint32_t offset, uint32_t bytes,
                                 Origin origin) {
  const int thread = self().agent;
  const Epoch epoch{static_cast<uint16_t>(thread), now_[thread], origin};
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& c = cell(owner, i);
    if (!c.written) {
      report("read of uninitialised shared memory", owner, i * kCellBytes, false, epoch, nullptr);
    }
    c.stored = true;
  }
}

void RaceDetector::access(const Block& owner, const Viewer& viewer, const Epoch& epoch,
                          uint32_t offset, uint32_t bytes, bool write) {
  const auto known = [&](const Epoch& past, bool written) {
    return knows(viewer, past.agent, past.time, written);
  };
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& c = cell(owner, i);
    if (c.written && !known(c.write, true)) {
      const bool unfenced = viewer.async && known(c.write, false);
      report(unfenced ? "asynchronous access to what was written without a proxy fence after it"
             : write  ? "two writes without an order (race)"
                      : "read of data whose write is not ordered before it (race)",
             owner, i * kCellBytes, write, epoch, &c.write);
    }
    if (!write) {
      if (!c.written) {
        report("read of uninitialised shared memory", owner, i * kCellBytes, write, epoch, nullptr);
      }
      std::erase_if(c.reads,
                    [&](const Epoch& r) { return r.agent == epoch.agent || known(r, false); });
      c.reads.push_back(epoch);
      continue;
    }
    for (const Epoch& read : c.reads) {
      if (known(read, false)) continue;
      report("write to data whose read is not ordered before it (race)", owner, i * kCellBytes,
             write, epoch, &read);
    }
    c.written = c.stored = true;
    c.write = epoch;
    c.reads.clear();
  }
}

std::string RaceDetector::describe(int agent, Origin origin) const {
  const int per_block = cluster_.blocks[0]->threads, warps = cluster_.blocks[0]->warps_count;
  const bool many = cluster_.blocks.size() > 1;
  const auto named = [&](const char* what, int index, int of_block) {
    const std::string of = many ? " of block " + std::to_string(index / of_block) : "";
    return what + std::to_string(index % of_block) + of + " at " + to_string(origin);
  };
  if (agent < threads_) return named("thread ", agent, per_block);
  if (agent < first_loads_) return named("wgmma of warp ", agent - threads_, warps);
  if (agent < first_copies_) return "bulk load at " + to_string(origin);
  const int thread = (agent - first_copies_) % threads_;
  const bool copies = agent < stores_of(0);
  return named(copies ? "cp.async of thread " : "bulk store of thread ", thread, per_block);
}

void RaceDetector::report(const char* what, const Block& owner, uint32_t offset, bool write,
                          const Epoch& one, const Epoch* other) const {
  const std::string first = describe(one.agent, one.origin);
  const std::string second = other ? "; the other: " + describe(other->agent, other->origin) : "";
  const std::string of = &owner == &block() ? "" : " of block " + std::to_string(owner.rank);
  fail("%s: smem+0x%x%s, %s by %s%s", what, offset, of.c_str(), write ? "write" : "read",
       first.c_str(), second.c_str());
}

void RaceDetector::expect_change(const Block& owner, const void* shared, uint32_t bytes) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(shared) - owner.smem);
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    cell(owner, i).stored = true;
  }
}

std::string RaceDetector::unseen_store(const Block& b, const std::string& until) {
  constexpr uint32_t kPiece = 64;  // most of shared memory is as it was
  Snapshot& snapshot = snapshots_[b.rank];
  for (uint32_t first = 0; first < b.smem_bytes; first += kPiece) {
    const uint32_t end = std::min(first + kPiece, b.smem_bytes);
    if (!memcmp(b.smem + first, snapshot.bytes.data() + first, end - first)) continue;
    for (uint32_t i = first; i < end; ++i) {
      if (b.smem[i] == snapshot.bytes[i] || cell(b, i / kCellBytes).stored) continue;
      char text[400];
      snprintf(text, sizeof text,
               "smem+0x%x changed between %s and %s by a store that the race detector can't see "
               "(an aggregate that a call returns?): store through an integer",
               i, snapshot.checked_at.c_str(), until.c_str());
      return text;
    }
    for (uint32_t i = first; i < end; ++i) cell(b, i / kCellBytes).stored = false;
    memcpy(snapshot.bytes.data() + first, b.smem + first, end - first);
  }
  snapshot.checked_at = until;
  return "";
}

void RaceDetector::check_unseen_stores(const Block& b, Location barrier) {
  const std::string found = unseen_store(b, to_string(barrier));
  if (!found.empty()) fail("%s", found.c_str());
}

std::string RaceDetector::end_block(const Block& b) {
  return unseen_store(b, "the end of the block");
}

}  // namespace simt
