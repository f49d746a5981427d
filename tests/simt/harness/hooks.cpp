// Race build: kernels are compiled with -fsanitize=thread, and the calls that g++ puts before
// every load and store come here instead of to libtsan.
#include <cstring>

#include "harness/memory.h"
#include "harness/race.h"
#include "harness/transactions.h"

namespace simt {

#ifdef SIMT_RACE
const bool kRaceBuild = true;
#else
const bool kRaceBuild = false;
void note_atomic(const void*, uint32_t, Location) {}
#endif

}  // namespace simt

#ifdef SIMT_RACE
namespace simt {
namespace {

void shared_access(const Block& b, uintptr_t address, uint32_t bytes, Kind kind, Origin origin) {
  const uintptr_t smem = reinterpret_cast<uintptr_t>(b.smem);
  if (address < smem) {
    fail("%s of %u bytes at smem-0x%x, before the block's, at %s", name_of(kind), bytes,
         static_cast<uint32_t>(smem - address), to_string(origin).c_str());
  }
  const auto offset = static_cast<uint32_t>(address - smem);
  if (offset + bytes > b.smem_bytes) {
    fail("%s of %u bytes at smem+0x%x, past the block's %u, at %s", name_of(kind), bytes, offset,
         b.smem_bytes, to_string(origin).c_str());
  }
  count_access(origin, offset, bytes, true);
  if (kind == Kind::kAtomic) {
    race().atomic_access(b, offset, bytes, origin);
  } else {
    race().thread_access(b, offset, bytes, kind == Kind::kWrite, origin);
  }
}

void check_spinning(Origin origin) {
  if (++self().accesses <= config.most_accesses) return;
  fail("the thread spins: %llu accesses without waiting for anybody, the last at %s",
       static_cast<unsigned long long>(config.most_accesses), to_string(origin).c_str());
}

// `aligned`: what the access' type promises, and a GPU's instruction would need.
void on_access(const void* p, uint32_t bytes, Kind kind, bool aligned, Origin origin) {
  if (!in_kernel() || bytes == 0) return;
  if (on_own_stack(p)) {
    if (!self().registers.arrays.empty()) {
      on_register_access(p, bytes, kind == Kind::kWrite, origin);
    }
    return;
  }
  check_spinning(origin);
  const auto address = reinterpret_cast<uintptr_t>(p);
  const Block* owner = block_of(p);
  const bool shared = owner != nullptr;
  if (aligned && address % bytes) {
    const bool device = shared || find_allocation(address, bytes).kind == Place::kInside;
    if (device) {
      fail("misaligned %u-byte %s access at %s", bytes, shared ? "shared" : "global",
           to_string(origin).c_str());
    }
  }
  shared ? shared_access(*owner, address, bytes, kind, origin)
         : global_access(address, bytes, kind, origin);
}

void on_bytes(const void* p, size_t bytes, Kind kind, const void* code) {
  on_access(p, static_cast<uint32_t>(bytes), kind, false, Origin(code));
}

}  // namespace

void note_atomic(const void* p, uint32_t bytes, Location here) {
  on_access(p, bytes, Kind::kAtomic, true, here);
}

}  // namespace simt

// NOLINTBEGIN: names and types are g++'s
#define CALLER __builtin_return_address(0)
#define ACCESS_OF(NAME, N, KIND, ALIGNED)                                   \
  void __tsan_##NAME##N(void* p) {                                          \
    simt::on_access(p, N, simt::Kind::KIND, ALIGNED, simt::Origin(CALLER)); \
  }
// What g++ calls unaligned has a type, or is a memcpy, that promises less than its size.
#define ACCESS(N)                                     \
  ACCESS_OF(read, N, kRead, true)                     \
  ACCESS_OF(write, N, kWrite, true)                   \
  ACCESS_OF(volatile_read, N, kRead, true)            \
  ACCESS_OF(volatile_write, N, kWrite, true)          \
  ACCESS_OF(unaligned_read, N, kRead, false)          \
  ACCESS_OF(unaligned_write, N, kWrite, false)        \
  ACCESS_OF(unaligned_volatile_read, N, kRead, false) \
  ACCESS_OF(unaligned_volatile_write, N, kWrite, false)

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
void __tsan_read_range(void* p, unsigned long n) {
  simt::on_bytes(p, n, simt::Kind::kRead, CALLER);
}
void __tsan_write_range(void* p, unsigned long n) {
  simt::on_bytes(p, n, simt::Kind::kWrite, CALLER);
}

// harness/redirect.h gives these names to the C library's functions in kernels.
void* simt_memcpy(void* to, const void* from, size_t n) {
  simt::on_bytes(from, n, simt::Kind::kRead, CALLER);
  simt::on_bytes(to, n, simt::Kind::kWrite, CALLER);
  return memcpy(to, from, n);
}
void* simt_memmove(void* to, const void* from, size_t n) {
  simt::on_bytes(from, n, simt::Kind::kRead, CALLER);
  simt::on_bytes(to, n, simt::Kind::kWrite, CALLER);
  return memmove(to, from, n);
}
void* simt_memset(void* to, int value, size_t n) {
  simt::on_bytes(to, n, simt::Kind::kWrite, CALLER);
  return memset(to, value, n);
}
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
