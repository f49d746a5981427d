// Allocations, as the hooks of the race build look them up.
#pragma once

#include "harness/simt.h"

namespace simt {

// Which block of which launch last touched two bytes; block 0 is nobody.
struct Touched {
  uint32_t launch, writer, reader;
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
Found find_allocation(uintptr_t address, size_t bytes);
const char* block_conflict(const Found& found, uintptr_t address, size_t bytes, bool write);

bool on_own_stack(const void* p);

}  // namespace simt
