// Race build: kernels are compiled with -fsanitize=thread, and the calls that g++ puts before
// every load and store come here instead of to libtsan.
#include "harness/memory.h"
#include "harness/race.h"
#include "harness/transactions.h"

namespace simt {

#ifdef SIMT_RACE
const bool kRaceBuild = true;
#else
const bool kRaceBuild = false;
#endif

}  // namespace simt

#ifdef SIMT_RACE
namespace simt {
namespace {

void shared_access(uintptr_t address, uint32_t bytes, bool write, Origin origin) {
  Block& b = block();
  const uintptr_t smem = reinterpret_cast<uintptr_t>(b.smem);
  if (address < smem) {
    fail("%s of %u bytes at smem-0x%x, before the block's, at %s", write ? "write" : "read", bytes,
         static_cast<uint32_t>(smem - address), to_string(origin).c_str());
  }
  const auto offset = static_cast<uint32_t>(address - smem);
  if (offset + bytes > b.smem_bytes) {
    fail("%s of %u bytes at smem+0x%x, past the block's %u, at %s", write ? "write" : "read", bytes,
         offset, b.smem_bytes, to_string(origin).c_str());
  }
  count_access(origin, offset, bytes, true);
  b.race->thread_access(self().id, offset, bytes, write, origin);
}

void global_access(uintptr_t address, uint32_t bytes, bool write, Origin origin) {
  const Found found = find_allocation(address, bytes);
  if (found.kind == Place::kElsewhere) return;  // constants and the kernel's own parameters
  if (found.kind == Place::kRedZone) {
    fail("global %s of %u bytes out of bounds, at %s", write ? "write" : "read", bytes,
         to_string(origin).c_str());
  }
  (write ? counters.global_write_bytes : counters.global_read_bytes) += bytes;
  count_access(origin, address, bytes, false);
  if (const char* conflict = block_conflict(found, address, bytes, write)) {
    fail("%s, at %s", conflict, to_string(origin).c_str());
  }
}

void on_access(const void* p, uint32_t bytes, bool write, const void* code) {
  if (!in_kernel() || on_own_stack(p)) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t smem = reinterpret_cast<uintptr_t>(block().smem);
  constexpr uintptr_t kRedZone = 1024;  // on both sides of shared memory
  const bool shared = address - (smem - kRedZone) < block().smem_bytes + 2 * kRedZone;
  const bool power = bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16;
  const bool device = shared || find_allocation(address, bytes).kind == Place::kInside;
  if (device && power && address % bytes) {
    fail("misaligned %u-byte %s access at %s", bytes, shared ? "shared" : "global",
         to_string(Origin(code)).c_str());
  }
  shared ? shared_access(address, bytes, write, Origin(code))
         : global_access(address, bytes, write, Origin(code));
}

}  // namespace
}  // namespace simt

// NOLINTBEGIN: names and types are g++'s
#define CALLER __builtin_return_address(0)
#define ACCESS(N)                                                                  \
  void __tsan_read##N(void* p) { simt::on_access(p, N, false, CALLER); }           \
  void __tsan_write##N(void* p) { simt::on_access(p, N, true, CALLER); }           \
  void __tsan_unaligned_read##N(void* p) { simt::on_access(p, N, false, CALLER); } \
  void __tsan_unaligned_write##N(void* p) { simt::on_access(p, N, true, CALLER); } \
  void __tsan_volatile_read##N(void* p) { simt::on_access(p, N, false, CALLER); }  \
  void __tsan_volatile_write##N(void* p) { simt::on_access(p, N, true, CALLER); }

// Atomics order nothing here and conflict with nothing: one OS thread runs everything.
#define ATOMICS(N, T)                                                                         \
  T __tsan_atomic##N##_load(const volatile T* p, int) { return *p; }                          \
  void __tsan_atomic##N##_store(volatile T* p, T v, int) { *p = v; }                          \
  T __tsan_atomic##N##_exchange(volatile T* p, T v, int) {                                    \
    const T old = *p;                                                                         \
    *p = v;                                                                                   \
    return old;                                                                               \
  }                                                                                           \
  T __tsan_atomic##N##_fetch_add(volatile T* p, T v, int) {                                   \
    const T old = *p;                                                                         \
    *p = static_cast<T>(old + v);                                                             \
    return old;                                                                               \
  }                                                                                           \
  int __tsan_atomic##N##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) { \
    const T old = *p;                                                                         \
    if (old == *expected) {                                                                   \
      *p = v;                                                                                 \
      return 1;                                                                               \
    }                                                                                         \
    *expected = old;                                                                          \
    return 0;                                                                                 \
  }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_read_range(void* p, unsigned long n) { simt::on_access(p, n, false, CALLER); }
void __tsan_write_range(void* p, unsigned long n) { simt::on_access(p, n, true, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
}
// NOLINTEND
#endif
