// simt: CUDA kernels on a CPU, thread by thread. The public part, which the host twins of csrc/ptx
// (tests/simt/ptx) are written on; state.h is what lies behind it.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

// A place in a kernel's source. As a default argument, here() is the place of the call.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
std::string to_string(Location location);  // file name and line
bool same_place(Location a, Location b);

// What launch() throws: the report of one mistake in a kernel.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Ends the launch with a report; from inside a kernel it adds block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The running thread and its block, as a kernel may see them.
struct ThreadView {
  uint3 index;
  int id, warp, lane;
};
struct BlockView {
  uint3 index;
  dim3 size, grid;
  char* smem;
  uint32_t smem_bytes;
};
extern ThreadView* current_thread;
extern BlockView* current_block;

// Which ready thread runs next. A thread runs until it has to wait.
enum class Order { kRoundRobin, kReverse, kFirst, kRandom };
// When asynchronous copies happen: at their issue, as late as their wait allows, or by a coin.
enum class Timing { kEager, kLazy, kRandom };

struct Config {
  Order order = Order::kRoundRobin;
  Timing timing = Timing::kLazy;
  uint64_t seed = 0;  // of kRandom, and of the order of blocks where it isn't 0
  uint32_t max_smem_bytes = 227 * 1024;
  bool hopper = false;                  // whether kernels for sm_90a run where there are any
  int multiprocessors = 2;              // that launches count on
  bool count_transactions = false;      // sectors and wavefronts (race build)
  Location dropped{nullptr, 0};         // this synchronisation does nothing: a mutant
  uint64_t most_accesses = 50'000'000;  // of a thread that waits for nobody (race build)
};
extern Config config;

// Exact counts of one or more launches. Bytes and transactions need the race build.
struct Counters {
  uint64_t launches, blocks, switches;
  uint64_t global_read_bytes, global_write_bytes;
  uint64_t global_sectors, global_ideal_sectors;        // of 32 bytes
  uint64_t shared_wavefronts, shared_ideal_wavefronts;  // of 128 bytes
  uint64_t mma_flops;
  uint64_t bulk_bytes;  // of boxes and rows between global and shared memory, zero fill too
  uint64_t wgmma_flops, wgmma_shared_bytes;  // what its operands are read with
};
extern Counters counters;

// True in the build whose memory accesses are seen one by one.
extern const bool kRaceBuild;

// --- Memory -----------------------------------------------------------------------------------
// "Device" memory: between red zones, filled with NaN, known to the bounds checks.
void* device_malloc(size_t bytes);
void device_free(void* p);
bool is_device_memory(const void* p);
void checked_global(const void* p, size_t bytes, const char* what, Location here);

// Shared addresses start here: CUDA 12 and newer keep the first KiB of a block's window.
constexpr uint32_t kSharedBase = 1024;
uint32_t shared_address(const void* p);

// Memory that an atomic reads and changes: checked like any other access, but for conflicts.
void note_atomic(const void* p, uint32_t bytes, Location here);

enum class Half { kFloat16, kBFloat16 };

// --- Synchronisation --------------------------------------------------------------------------
// Every wrapper that synchronises asks this first: false drops it. The places are recorded.
bool takes_part(const char* kind, Location here);
struct Site {
  std::string kind, file;
  int line;
};
std::vector<Site> sites();
void forget_sites();

// A warp-wide operation: runs `run` once, by the last lane of `mask` to come, with the records of
// all lanes (null outside of the mask).
using WarpFunction = void (*)(void** records, uint32_t mask);
void warp_collective(const char* kind, uint32_t mask, void* record, WarpFunction run,
                     Location here);
void sync_warp(uint32_t mask, Location here);
uint32_t vote(uint32_t mask, bool predicate, Location here);

constexpr int kAllThreads = -1;
void barrier_sync(int barrier, int threads, Location here);
void barrier_arrive(int barrier, int threads, Location here);
int barrier_reduce(int predicate, Location here);  // __syncthreads_count

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Location here);
void mbarrier_invalidate(uint64_t* barrier, Location here);
void mbarrier_arrive(uint64_t* barrier, Location here);
void mbarrier_arrive_cp_async(uint64_t* barrier, Location here);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Location here);

// With bytes to expect, of copies that count them down.
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, bool arrives, Location here);
void mbarrier_arrive_at(uint64_t* barrier, int rank, Location here);  // in a block of the cluster
void fence_mbarrier_init(Location here);

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Location here);
void cp_async_commit(Location here);
void cp_async_wait(int pending_groups, Location here);

// --- Tensor maps and bulk copies --------------------------------------------------------------
enum class Element { kFloat32, kFloat16, kBFloat16 };
constexpr int kMaxRank = 5;
struct TensorMap {
  char* base;
  Element element;
  int rank;
  int64_t sizes[kMaxRank], strides[kMaxRank];  // innermost first; bytes
  int box[kMaxRank];
  int swizzle;  // bytes of a row that it permutes: 128, 64, 32, or 0
};
// What is wrong with it, null: nothing.
const char* problem_of(const TensorMap& map);
// Into the same place of every block of the cluster that `blocks` has a bit of; 0: into this one's.
void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, const int* at, int rank,
              uint32_t blocks, Location here);
void tma_store(const TensorMap& map, const void* shared, const int* at, int rank, bool adds,
               Location here);
// Without a map: bytes that lie one behind the other; floats that are added.
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Location here);
void bulk_add(void* global, const void* shared, uint32_t bytes, Location here);
void add_floats(float* global, const float* values, int count, Location here);  // from registers
void bulk_commit(Location here);
void bulk_wait(int pending_groups, bool reads_only, Location here);
void fence_proxy_async(Location here);

// --- Warpgroups -------------------------------------------------------------------------------
struct WgmmaShape {
  int N;
  Half type;
  bool a_turned, b_turned;  // MN-major
};
void wgmma_fence(Location here);
void wgmma_commit(Location here);
void wgmma_wait(int pending_groups, Location here);
// a_registers null: a is a descriptor.
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, Location here);
void set_registers(int count, bool increases, Location here);  // of the warp's threads

// --- Clusters ---------------------------------------------------------------------------------
int cluster_rank();
void cluster_arrive(Location here);
void cluster_wait(Location here);
void* cluster_shared(void* shared, int rank, Location here);

// --- Matrices ---------------------------------------------------------------------------------
uint32_t movmatrix(uint32_t value, Location here);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Location here);
void stmatrix(const uint32_t* registers, void* row, int matrices, bool transposed, Location here);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type, Location here);

// --- Launch -----------------------------------------------------------------------------------
void run_grid(const void* kernel, dim3 grid, dim3 block, size_t smem_bytes, int cluster,
              const std::function<void()>& body);
std::vector<std::string> kernels_run();  // every instantiation that was launched, by name

// One value through all lanes of a mask: lane l gets that of lane source.
template <class T>
T shuffle(uint32_t mask, T value, int source, Location here) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Record {
    T in, out;
    int source;
    Location here;
  } record{value, value, source, here};
  warp_collective(
      "__shfl_sync", mask, &record,
      [](void** records, uint32_t mask) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(mask >> lane & 1)) continue;
          auto* mine = static_cast<Record*>(records[lane]);
          if (!(mask >> mine->source & 1)) {
            fail("shuffle at %s: lane %d reads lane %d, which is not in mask %08x",
                 to_string(mine->here).c_str(), lane, mine->source, mask);
          }
          mine->out = static_cast<Record*>(records[mine->source])->in;
        }
      },
      here);
  return record.out;
}

}  // namespace simt
