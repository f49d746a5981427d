// Registers of products under way: the sums, which hold NaN meanwhile, and left operands.
#include "harness/product_registers.h"

#include <cstring>

#include "harness/operands.h"
#include "harness/race.h"

namespace simt {
namespace {

constexpr int kRows = kProductRows, kDepth = kOperandDepth;
constexpr uint32_t kPoison = 0x7fc0dead;  // NaN, in registers that a product is writing

int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

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

}  // namespace

void begin_sums(WarpProducts& products, const WarpProduct& p) {
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

void check_registers(const WarpProduct& p) {
  const bool in_flight = products_of_warp().in_flight.count(p.d[0]) > 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Fiber& fiber = lane_of_warp(lane);
    if (!in_flight) use_registers(fiber, p.d[lane], 2 * p.shape.N, "the sums", p.here);
    if (p.from_registers) use_registers(fiber, p.a_registers[lane], 16, "registers of A", p.here);
  }
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

}  // namespace simt
