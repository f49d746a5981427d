// wgmma: products of a warpgroup that read shared memory by themselves, and registers until they
// are waited for. Each warp is modelled alone: 16 rows of A and of the sums, all of B.
//
#include <cstring>

#include "harness/operands.h"
#include "harness/race.h"

namespace simt {
namespace {

constexpr int kRows = 16, kDepth = kOperandDepth, kGroupWarps = 4;
constexpr uint32_t kPoison = 0x7fc0dead;  // NaN, in registers that a product is writing

Operand a_of(const WarpProduct& p) {
  const auto first = static_cast<uint32_t>(self().warp % kGroupWarps * kRows);
  return {p.a, first, kRows, p.shape.a_turned};
}
Operand b_of(const WarpProduct& p) {
  return {p.b, 0, static_cast<uint32_t>(p.shape.N), p.shape.b_turned};
}

// --- Registers -------------------------------------------------------------------------------

int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

Fiber& lane_of_warp(int lane) { return *block().fibers[self().warp * kWarpSize + lane]; }

// Registers of a thread that a product is about to use: untouched since the last fence.
RegisterArray& use_registers(Fiber& fiber, const void* p, size_t bytes, const char* what,
                             Location here) {
  const auto first = reinterpret_cast<uintptr_t>(p), end = first + bytes;
  auto& arrays = fiber.registers.arrays;
  for (RegisterArray& array : arrays) {
    if (array.first != first || array.end != end) continue;
    if (array.touched > fiber.registers.fenced) {
      fail("wgmma at %s: %s of lane %d were touched after the last wgmma.fence",
           to_string(here).c_str(), what, fiber.lane);
    }
    return array;
  }
  std::erase_if(arrays, [&](const RegisterArray& a) { return a.first < end && first < a.end; });
  arrays.push_back({first, end});
  return arrays.back();
}

RegisterArray* array_at(Fiber& fiber, const void* p) {
  for (RegisterArray& array : fiber.registers.arrays) {
    if (array.first == reinterpret_cast<uintptr_t>(p)) return &array;
  }
  return nullptr;
}

void set_in_flight(Fiber& fiber, const float* d, bool in_flight) {
  RegisterArray* array = kRaceBuild ? array_at(fiber, d) : nullptr;
  if (array != nullptr) array->sums_in_flight = in_flight;
}

// The sums move from the registers, which hold NaN from now on.
Sums& begin_sums(WarpProducts& products, const WarpProduct& p) {
  const auto [at, fresh] = products.in_flight.try_emplace(p.d[0]);
  Sums& sums = at->second;
  const int N = p.shape.N;
  if (fresh) {
    sums.value.resize(kRows * N);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < N / 2; ++i) {
        sums.value[row_of(lane, i) * N + column_of(lane, i)] = p.d[lane][i];
        memcpy(p.d[lane] + i, &kPoison, sizeof kPoison);
      }
      set_in_flight(lane_of_warp(lane), p.d[lane], true);
    }
  } else if (static_cast<int>(sums.value.size()) != kRows * N) {
    fail("wgmma at %s: its sums are in flight in another shape", to_string(p.here).c_str());
  }
  ++sums.products;
  return sums;
}

void end_sums(WarpProducts& products, const WarpProduct& p) {
  Sums& sums = products.in_flight.at(p.d[0]);
  if (--sums.products > 0) return;
  const int N = p.shape.N;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    set_in_flight(lane_of_warp(lane), p.d[lane], false);
    for (int i = 0; i < N / 2; ++i) {
      if (memcmp(p.d[lane] + i, &kPoison, sizeof kPoison)) {
        fail("wgmma at %s: register %d of lane %d was written while a product was adding to it",
             to_string(p.here).c_str(), i, lane);
      }
      p.d[lane][i] = sums.value[row_of(lane, i) * N + column_of(lane, i)];
    }
  }
  products.in_flight.erase(p.d[0]);
}

void check_left_operand(const WarpProduct& p) {
  for (int lane = 0; p.from_registers && lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      if (p.a_registers[lane][i] == p.a_at_issue[lane][i]) continue;
      fail("wgmma at %s: register %d of A in lane %d changed before the product was done",
           to_string(p.here).c_str(), i, lane);
    }
  }
}

void load_registers(std::vector<float>& values, const WarpProduct& p) {
  values.resize(kDepth * kRows);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = p.a_at_issue[lane][i];
      const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
      values[k * kRows + row] = to_float(static_cast<uint16_t>(pair), p.shape.type);
      values[(k + 1) * kRows + row] = to_float(static_cast<uint16_t>(pair >> 16), p.shape.type);
    }
  }
}

// --- Products --------------------------------------------------------------------------------

WarpProducts& products_of_warp() { return block().warps[self().warp].products; }

__attribute__((noinline)) void multiply(float* __restrict sums, const float* __restrict a,
                                        const float* __restrict b, int N) {
  for (int k = 0; k < kDepth; ++k) {
    for (int m = 0; m < kRows; ++m) {
      const float left = a[k * kRows + m];
      for (int n = 0; n < N; ++n) sums[m * N + n] += left * b[k * N + n];
    }
  }
}

void perform(WarpProduct& p) {
  if (p.done) return;
  p.done = true;
  std::vector<float>& sums = products_of_warp().in_flight.at(p.d[0]).value;
  static std::vector<float> a, b;
  if (!p.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  p.from_registers ? load_registers(a, p) : load_operand(a, a_of(p), p.shape.type, p.here);
  load_operand(b, b_of(p), p.shape.type, p.here);
  multiply(sums.data(), a.data(), b.data(), p.shape.N);
}

void perform_all(WarpProducts& products) {
  for (ProductGroup& group : products.groups) {
    for (WarpProduct& p : group.products) perform(p);
  }
  for (WarpProduct& p : products.open.products) perform(p);
}

// A whole warp at one place; `run` is done once.
void aligned(const char* kind, void* record, WarpFunction run, Location here) {
  if (block().threads % (kGroupWarps * kWarpSize)) {
    fail("%s at %s: a block of %d threads is not whole warpgroups", kind, to_string(here).c_str(),
         block().threads);
  }
  warp_collective(kind, ~0u, record, run, here);
}

void note_reads(const WarpProduct& p, uint32_t group) {
  const int first_agent = self().agent - self().lane;
  const int warp = block().rank * block().warps_count + self().warp;
  const VectorClock clock = race().clock_at_issue_of_warp(first_agent);
  const Viewer viewer{clock, -1, true};
  const Epoch epoch{static_cast<uint16_t>(race().products_of(warp)), group, p.here};
  const auto note = [&](const Operand& o) {
    for (const Chunk& chunk : chunks_of(o, p.here)) {
      race().access(block(), viewer, epoch, chunk.offset, kChunkBytes, false);
    }
  };
  if (!p.from_registers) note(a_of(p));
  note(b_of(p));
}

void count(const WarpProduct& p) {
  counters.wgmma_flops += uint64_t{2} * kRows * kDepth * p.shape.N;
  // The four warps read B once together.
  const uint64_t a_bytes = p.from_registers ? 0 : 2 * kRows * kDepth;
  counters.wgmma_shared_bytes += a_bytes + uint64_t{2} * kDepth * p.shape.N / kGroupWarps;
}

struct Record {
  WgmmaShape shape;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
  Location here;
};

WarpProduct gathered(void** lanes) {
  const Record& first = *static_cast<Record*>(lanes[0]);
  WarpProduct p{first.shape, first.a, first.b, first.accumulate, first.a_registers != nullptr,
                {},          {},      {},      first.here};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Record& mine = *static_cast<Record*>(lanes[lane]);
    if (mine.a != p.a || mine.b != p.b || mine.accumulate != p.accumulate) {
      fail("wgmma at %s: descriptors or scale-d of lanes 0 and %d differ",
           to_string(p.here).c_str(), lane);
    }
    p.d[lane] = mine.d;
    p.a_registers[lane] = mine.a_registers;
    if (p.from_registers) memcpy(p.a_at_issue[lane].data(), mine.a_registers, 16);
  }
  return p;
}

void check_registers(const WarpProduct& p) {
  const bool in_flight = products_of_warp().in_flight.count(p.d[0]) > 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Fiber& fiber = lane_of_warp(lane);
    if (!in_flight) use_registers(fiber, p.d[lane], 2 * p.shape.N, "the sums", p.here);
    if (p.from_registers) use_registers(fiber, p.a_registers[lane], 16, "registers of A", p.here);
  }
}

void issue(void** lanes, uint32_t) {
  WarpProduct p = gathered(lanes);
  WarpProducts& products = products_of_warp();
  if (!products.fenced) {
    fail("wgmma at %s: no wgmma.fence since the last commit", to_string(p.here).c_str());
  }
  if (kRaceBuild) {
    check_registers(p);
    note_reads(p, products.committed + 1);
  }
  begin_sums(products, p);
  count(p);
  products.open.products.push_back(p);
  if (happens_now()) perform_all(products);
}

}  // namespace

void wgmma_fence(Location here) {
  if (!takes_part("wgmma fence", here)) return;
  aligned(
      "wgmma.fence", nullptr,
      [](void**, uint32_t) {
        products_of_warp().fenced = true;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          Registers& registers = lane_of_warp(lane).registers;
          registers.fenced = ++registers.clock;
        }
      },
      here);
}

void wgmma_commit(Location here) {
  if (!takes_part("wgmma commit", here)) return;
  aligned(
      "wgmma.commit_group", nullptr,
      [](void**, uint32_t) {
        WarpProducts& products = products_of_warp();
        products.groups.push_back(std::move(products.open));
        products.open = {};
        products.fenced = false;
        ++products.committed;
      },
      here);
}

void wgmma_wait(int pending_groups, Location here) {
  if (!takes_part("wgmma wait", here)) return;
  struct Wait {
    size_t pending;
    Location here;
  } record{static_cast<size_t>(pending_groups), here};
  aligned(
      "wgmma.wait_group", &record,
      [](void** lanes, uint32_t) {
        const Wait& wait = *static_cast<Wait*>(lanes[0]);
        WarpProducts& products = products_of_warp();
        if (wait.pending == 0 && !products.open.products.empty()) {
          fail("wgmma wait at %s: products that were never committed, issued at %s",
               to_string(wait.here).c_str(), to_string(products.open.products[0].here).c_str());
        }
        while (products.groups.size() > wait.pending) {
          for (WarpProduct& p : products.groups.front().products) {
            perform(p);
            check_left_operand(p);
            end_sums(products, p);
          }
          products.groups.erase(products.groups.begin());
        }
        if (!kRaceBuild) return;
        const int warp = block().rank * block().warps_count + self().warp;
        const auto done = static_cast<uint32_t>(products.committed - products.groups.size());
        for (int lane = 0; lane < kWarpSize; ++lane) {
          race().acquire_time(lane_of_warp(lane).agent, race().products_of(warp), done);
        }
      },
      here);
}

void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, Location here) {
  Record record{shape, d, a_registers, a, b, accumulate, here};
  aligned("wgmma.mma_async", &record, issue, here);
}

void on_register_access(const void* p, uint32_t bytes, bool write, Origin origin) {
  Fiber& fiber = self();
  const auto first = reinterpret_cast<uintptr_t>(p), end = first + bytes;
  for (RegisterArray& array : fiber.registers.arrays) {
    if (first >= array.end || array.first >= end) continue;
    if (array.sums_in_flight) {
      fail("%s of registers that a product is adding to (no wgmma.wait_group before it), at %s",
           write ? "write" : "read", to_string(origin).c_str());
    }
    array.touched = ++fiber.registers.clock;
  }
}

std::string leftover_products(const Block& b) {
  for (int warp = 0; warp < b.warps_count; ++warp) {
    const WarpProducts& products = b.warps[warp].products;
    const bool open = !products.open.products.empty();
    if (!open && products.in_flight.empty()) continue;
    const WarpProduct& p = open ? products.open.products[0] : products.groups[0].products[0];
    return "warp " + std::to_string(warp) + " ended with products that nobody waited for, of " +
           to_string(p.here);
  }
  return "";
}

}  // namespace simt
