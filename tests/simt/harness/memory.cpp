// Device memory with red zones, shared memory, and what every access is checked against.
#include <cstdlib>
#include <cstring>

#include "harness/arena.h"
#include "harness/memory.h"
#include "harness/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace simt {
namespace {

constexpr size_t kRedZone = 4096;
constexpr size_t kAlignment = 512;  // that of torch's CUDA allocator
constexpr int kPoisonByte = 0xff;   // NaN in fp32, fp16 and bf16; -1 in integers
constexpr size_t kSharedAlignment = 1024;

// By address. Never destroyed: tensors may outlive this library's other objects.
auto& allocations = *new std::map<uintptr_t, Allocation>;
auto& allocations_mutex = *new std::recursive_mutex;
uint32_t launches_begun;

}  // namespace

std::unique_lock<std::recursive_mutex> lock_allocations() {
  return std::unique_lock(allocations_mutex);
}

uint32_t launch_serial() { return launches_begun; }

Arena::Arena(size_t bytes) : bytes_(static_cast<uint32_t>(bytes)) {
  const size_t rounded = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const size_t whole = rounded + 2 * kSharedAlignment;
  allocation_ = static_cast<char*>(aligned_alloc(kSharedAlignment, whole));
  data_ = allocation_ + kSharedAlignment;
  ASAN_POISON_MEMORY_REGION(allocation_, kSharedAlignment);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, rounded - bytes + kSharedAlignment);
}

Arena::~Arena() {
  const size_t rounded = (bytes_ + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  ASAN_UNPOISON_MEMORY_REGION(allocation_, rounded + 2 * kSharedAlignment);
  free(allocation_);
}

void Arena::poison() { memset(data_, kPoisonByte, bytes_); }

void begin_launch() { ++launches_begun; }

void* device_malloc(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t whole = rounded + 2 * kRedZone;
  char* zone =
      static_cast<char*>(aligned_alloc(kRedZone, (whole + kRedZone - 1) / kRedZone * kRedZone));
  if (zone == nullptr) throw std::bad_alloc();
  memset(zone, kPoisonByte, whole);
  char* p = zone + kRedZone;
  ASAN_POISON_MEMORY_REGION(zone, kRedZone);
  ASAN_POISON_MEMORY_REGION(p + bytes, rounded - bytes + kRedZone);
  const auto lock = lock_allocations();
  allocations.emplace(reinterpret_cast<uintptr_t>(p), Allocation{bytes, {}});
  return p;
}

void device_free(void* p) {
  const auto lock = lock_allocations();
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(p));
  if (found == allocations.end()) throw Error("device_free of a pointer that is no allocation");
  const size_t rounded = (found->second.bytes + kAlignment - 1) / kAlignment * kAlignment;
  char* zone = static_cast<char*>(p) - kRedZone;
  ASAN_UNPOISON_MEMORY_REGION(zone, rounded + 2 * kRedZone);
  allocations.erase(found);
  free(zone);
}

bool is_device_memory(const void* p) {
  const auto lock = lock_allocations();
  return find_allocation(reinterpret_cast<uintptr_t>(p), 0).kind == Place::kInside;
}

Found find_allocation(uintptr_t address, size_t bytes) {
  auto next = allocations.upper_bound(address);
  const bool before_next = next != allocations.end() && address + kRedZone >= next->first;
  if (next == allocations.begin()) {
    return {before_next ? Place::kRedZone : Place::kElsewhere, 0, nullptr};
  }
  --next;
  const uintptr_t end = next->first + next->second.bytes;
  if (address + bytes <= end) return {Place::kInside, next->first, &next->second};
  const bool near = before_next || address < end + kRedZone;
  return {near ? Place::kRedZone : Place::kElsewhere, next->first, &next->second};
}

void checked_global(const void* p, size_t bytes, const char* what, Location here) {
  if (find_allocation(reinterpret_cast<uintptr_t>(p), bytes).kind == Place::kInside) return;
  fail("%s at %s: %zu bytes at %p are outside of every allocation", what, to_string(here).c_str(),
       bytes, p);
}

uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const char*>(p) - block().smem;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(block().smem_bytes)) {
    fail("%p is not in dynamic shared memory", p);
  }
  return static_cast<uint32_t>(offset) + kSharedBase;
}

uint32_t checked_shared_offset(uint32_t address, uint32_t bytes, const char* what, Location here) {
  if (address < kSharedBase || uint64_t{address} - kSharedBase + bytes > block().smem_bytes) {
    fail("%s at %s: %u bytes at shared address 0x%x are outside of the block's %u", what,
         to_string(here).c_str(), bytes, address, block().smem_bytes);
  }
  return address - kSharedBase;
}

}  // namespace simt
