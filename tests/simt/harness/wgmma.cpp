// wgmma: products of a warpgroup that read shared memory by themselves, and registers until they
// are waited for. Each warp is modelled alone: 16 rows of A and of the sums, all of B.
#include <cstring>

#include "harness/operands.h"
#include "harness/product_registers.h"
#include "harness/race.h"

namespace simt {
namespace {

constexpr int kRows = kProductRows, kDepth = kOperandDepth, kGroupWarps = 4;

Operand a_of(const WarpProduct& p) {
  const auto first = static_cast<uint32_t>(self().warp % kGroupWarps * kRows);
  return {p.a, first, kRows, p.shape.a_turned};
}
Operand b_of(const WarpProduct& p) {
  return {p.b, 0, static_cast<uint32_t>(p.shape.N), p.shape.b_turned};
}

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
