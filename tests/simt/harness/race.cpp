#include "harness/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

constexpr uint32_t kCellBytes = 2;

uint32_t block_serial;  // cells of earlier blocks count as untouched, without being cleared

}  // namespace

void join_clocks(VectorClock& into, const VectorClock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void raise_time(VectorClock& clock, int agent, uint32_t time) {
  if (clock.size() <= static_cast<size_t>(agent)) clock.resize(agent + 1, 0);
  clock[agent] = std::max(clock[agent], time);
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

RaceDetector::RaceDetector(const Block& block)
    : block_(block),
      threads_(block.threads),
      now_(block.threads, 1),
      clocks_(block.threads),
      snapshot_(block.smem, block.smem + block.smem_bytes) {
  ++block_serial;
}

RaceDetector::Cell& RaceDetector::cell(uint32_t index) {
  static std::vector<Cell> all;
  if (index >= all.size()) all.resize(block_.smem_bytes / kCellBytes + 1);
  Cell& c = all[index];
  if (c.block_serial != block_serial) {
    c.block_serial = block_serial;
    c.written = c.stored = false;
    c.reads.clear();
  }
  return c;
}

void RaceDetector::synchronise_lanes(int warp, uint32_t mask) {
  VectorClock all;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) release(warp * kWarpSize + lane, all);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) clocks_[warp * kWarpSize + lane] = all;
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

void RaceDetector::acquire_copies(int thread, size_t up_to_copy) {
  raise_time(clocks_[thread], copies_of(thread), static_cast<uint32_t>(up_to_copy));
}

void RaceDetector::thread_access(int thread, uint32_t offset, uint32_t bytes, bool write,
                                 Origin origin) {
  access({static_cast<uint16_t>(thread), now_[thread], origin}, thread, offset, bytes, write);
}

void RaceDetector::copy_access(int thread, size_t serial, uint32_t offset, uint32_t bytes,
                               Origin origin) {
  const Epoch epoch{static_cast<uint16_t>(copies_of(thread)), static_cast<uint32_t>(serial),
                    origin};
  access(epoch, thread, offset, bytes, true);
}

void RaceDetector::atomic_access(int thread, uint32_t offset, uint32_t bytes, Origin origin) {
  const Epoch epoch{static_cast<uint16_t>(thread), now_[thread], origin};
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& c = cell(i);
    if (!c.written) {
      report("read of uninitialised shared memory", i * kCellBytes, false, epoch, nullptr);
    }
    c.stored = true;
  }
}

void RaceDetector::access(const Epoch& epoch, int thread, uint32_t offset, uint32_t bytes,
                          bool write) {
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& c = cell(i);
    if (c.written && !knows(thread, c.write)) {
      report(write ? "two writes without an order (race)"
                   : "read of data whose write is not ordered before it (race)",
             i * kCellBytes, write, epoch, &c.write);
    }
    if (!write) {
      if (!c.written) {
        report("read of uninitialised shared memory", i * kCellBytes, write, epoch, nullptr);
      }
      std::erase_if(c.reads,
                    [&](const Epoch& r) { return r.agent == epoch.agent || knows(thread, r); });
      c.reads.push_back(epoch);
      continue;
    }
    for (const Epoch& read : c.reads) {
      if (knows(thread, read)) continue;
      report("write to data whose read is not ordered before it (race)", i * kCellBytes, write,
             epoch, &read);
    }
    c.written = c.stored = true;
    c.write = epoch;
    c.reads.clear();
  }
}

std::string RaceDetector::describe(int agent, Origin origin) const {
  const bool copy = agent >= threads_;
  const int thread = copy ? agent - threads_ : agent;
  return std::string(copy ? "cp.async of thread " : "thread ") + std::to_string(thread) + " at " +
         to_string(origin);
}

void RaceDetector::report(const char* what, uint32_t offset, bool write, const Epoch& one,
                          const Epoch* other) const {
  const std::string first = describe(one.agent, one.origin);
  const std::string second = other ? "; the other: " + describe(other->agent, other->origin) : "";
  fail("%s: smem+0x%x, %s by %s%s", what, offset, write ? "write" : "read", first.c_str(),
       second.c_str());
}

void RaceDetector::expect_change(const void* shared, uint32_t bytes) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(shared) - block_.smem);
  for (uint32_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    cell(i).stored = true;
  }
}

std::string RaceDetector::unseen_store(const std::string& until) {
  constexpr uint32_t kPiece = 64;  // most of shared memory is as it was
  for (uint32_t first = 0; first < block_.smem_bytes; first += kPiece) {
    const uint32_t end = std::min(first + kPiece, block_.smem_bytes);
    if (!memcmp(block_.smem + first, snapshot_.data() + first, end - first)) continue;
    for (uint32_t i = first; i < end; ++i) {
      if (block_.smem[i] == snapshot_[i] || cell(i / kCellBytes).stored) continue;
      char text[400];
      snprintf(text, sizeof text,
               "smem+0x%x changed between %s and %s by a store that the race detector can't see "
               "(an aggregate that a call returns?): store through an integer",
               i, checked_at_.c_str(), until.c_str());
      return text;
    }
    for (uint32_t i = first; i < end; ++i) cell(i / kCellBytes).stored = false;
    memcpy(snapshot_.data() + first, block_.smem + first, end - first);
  }
  checked_at_ = until;
  return "";
}

void RaceDetector::check_unseen_stores(Location barrier) {
  const std::string found = unseen_store(to_string(barrier));
  if (!found.empty()) fail("%s", found.c_str());
}

std::string RaceDetector::end_block() { return unseen_store("the end of the block"); }

}  // namespace simt
