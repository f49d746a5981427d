#include "harness/transactions.h"

#include <algorithm>
#include <unordered_map>

namespace simt {
namespace {

constexpr uint32_t kSectorBytes = 32;
constexpr uint32_t kBanks = 32, kBankBytes = 4;

struct Lanes {
  uint32_t mask = 0;
  bool shared = false;
  std::array<uintptr_t, kWarpSize> address{};
  std::array<uint32_t, kWarpSize> bytes{};
};

struct WarpAccesses {
  std::unordered_map<uint64_t, Lanes> instructions;
  std::array<std::unordered_map<uint64_t, uint32_t>, kWarpSize> visits;
};

// Of the blocks of the running cluster, by rank.
struct BlockAccesses {
  const Block* block = nullptr;
  std::vector<WarpAccesses> warps;
};
std::array<BlockAccesses, kMaxClusterBlocks> blocks;

uint64_t place_of(Origin origin) {
  if (origin.code != nullptr) return reinterpret_cast<uint64_t>(origin.code);
  return reinterpret_cast<uint64_t>(origin.here.file) * 31 + origin.here.line;
}

template <class T>
void keep_distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

uint64_t distinct_bytes(const Lanes& lanes) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes.mask >> lane & 1) {
      spans.emplace_back(lanes.address[lane], lanes.address[lane] + lanes.bytes[lane]);
    }
  }
  std::sort(spans.begin(), spans.end());
  uint64_t bytes = 0;
  uintptr_t counted_to = 0;
  for (const auto& [first, end] : spans) {
    if (end <= counted_to) continue;
    bytes += end - std::max(first, counted_to);
    counted_to = end;
  }
  return bytes;
}

void count_sectors(const Lanes& lanes) {
  std::vector<uintptr_t> sectors;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes.mask >> lane & 1)) continue;
    const uintptr_t first = lanes.address[lane], last = first + lanes.bytes[lane] - 1;
    for (uintptr_t s = first / kSectorBytes; s <= last / kSectorBytes; ++s) sectors.push_back(s);
  }
  keep_distinct(sectors);
  counters.global_sectors += sectors.size();
  counters.global_ideal_sectors += (distinct_bytes(lanes) + kSectorBytes - 1) / kSectorBytes;
}

// Lanes whose accesses one wavefront can serve: 128 bytes in all.
int lanes_at_once(const Lanes& lanes) {
  const uint32_t widest = *std::max_element(lanes.bytes.begin(), lanes.bytes.end());
  return widest >= 16 ? 8 : widest == 8 ? 16 : 32;
}

void count_wavefronts(const Lanes& lanes) {
  const int step = lanes_at_once(lanes);
  for (int first = 0; first < kWarpSize; first += step) {
    std::vector<uintptr_t> words;
    for (int lane = first; lane < first + step; ++lane) {
      if (!(lanes.mask >> lane & 1)) continue;
      const uintptr_t end = lanes.address[lane] + lanes.bytes[lane];
      for (uintptr_t w = lanes.address[lane] / kBankBytes; w * kBankBytes < end; ++w) {
        words.push_back(w);
      }
    }
    if (words.empty()) continue;
    keep_distinct(words);
    std::array<int, kBanks> in_bank{};
    for (uintptr_t w : words) ++in_bank[w % kBanks];
    counters.shared_wavefronts += *std::max_element(in_bank.begin(), in_bank.end());
    counters.shared_ideal_wavefronts += (words.size() + kBanks - 1) / kBanks;
  }
}

}  // namespace

void count_access(Origin origin, uintptr_t address, uint32_t bytes, bool shared) {
  if (!kRaceBuild || !config.count_transactions) return;
  const Fiber& fiber = self();
  BlockAccesses& of_block = blocks[block().rank];
  if (of_block.block != &block() || of_block.warps.size() != block().warps.size()) {
    of_block = {&block(), std::vector<WarpAccesses>(block().warps.size())};
  }
  WarpAccesses& warp = of_block.warps[fiber.warp];
  const uint64_t place = place_of(origin);
  const uint64_t key = place << 20 | (warp.visits[fiber.lane][place]++ & 0xfffff);
  Lanes& lanes = warp.instructions[key];
  lanes.mask |= 1u << fiber.lane;
  lanes.shared = shared;
  lanes.address[fiber.lane] = address;
  lanes.bytes[fiber.lane] = bytes;
}

// ldmatrix and stmatrix read or write the eight 16-byte rows of a matrix at a time.
void count_matrix_rows(const uint32_t* row_addresses, int matrices) {
  if (!kRaceBuild || !config.count_transactions) return;
  constexpr int kRows = 8, kRowBytes = 16;
  for (int m = 0; m < matrices; ++m) {
    std::array<int, kRows> in_column{};
    for (int row = 0; row < kRows; ++row) {
      ++in_column[row_addresses[m * kRows + row] / kRowBytes % kRows];
    }
    counters.shared_wavefronts += *std::max_element(in_column.begin(), in_column.end());
    counters.shared_ideal_wavefronts += 1;
  }
}

void flush_transactions(int warp) {
  if (!kRaceBuild) return;
  BlockAccesses& of_block = blocks[block().rank];
  if (of_block.block != &block() || warp >= static_cast<int>(of_block.warps.size())) return;
  std::vector<WarpAccesses>& warps = of_block.warps;
  for (const auto& [key, lanes] : warps[warp].instructions) {
    lanes.shared ? count_wavefronts(lanes) : count_sectors(lanes);
  }
  warps[warp] = {};
}

}  // namespace simt
