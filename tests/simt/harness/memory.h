// Allocations, as the hooks of the race build look them up, and what it keeps of every access.
#pragma once

#include <mutex>

#include "harness/simt.h"

namespace simt {

// A thread or its copies, when, and at which place in the source (global.cpp); time 0 is nobody.
struct Trace {
  uint32_t time = 0;
  uint16_t agent = 0, place = 0;
};
// Which block of which launch last touched two bytes, block 0 is nobody; and who in it. Adds of
// several blocks are no conflict, an add beside an ordinary access is one.
struct Touched {
  uint32_t launch, writer, reader, adder;
  Trace write, reads[2];
};
struct Allocation {
  size_t bytes;
  std::vector<Touched> touched;  // made at the first access in the race build
};

enum class Place { kInside, kRedZone, kElsewhere };
struct Found {
  Place kind;
  uintptr_t start;
  Allocation* allocation;
};
Found find_allocation(uintptr_t address, size_t bytes);  // inside of a launch, or locked
uint32_t launch_serial();

// Allocations stay as they are while the lock lives: a launch holds it, so that its accesses need
// not, whatever torch's other threads free.
std::unique_lock<std::recursive_mutex> lock_allocations();

bool on_own_stack(const void* p);

}  // namespace simt
