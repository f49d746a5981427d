// What is under way on behalf of threads on sm_90: bulk copies and warpgroup products.
#pragma once

#include <array>
#include <map>

#include "harness/simt.h"

namespace simt {

constexpr int kMaxClusterBlocks = 16;

// Where swizzling puts the 16 bytes at a shared address: bits 4 and up are exchanged by bits 7 and
// up, as many as a span of 32, 64 or 128 bytes has.
constexpr uint32_t swizzled(uint32_t address, int span) {
  return span == 0 ? address : address ^ (address >> 3 & (static_cast<uint32_t>(span) - 16));
}

// tensor_map.cpp: a row of a box of which elements [first, end) are inside of the tensor.
struct BoxRow {
  int64_t offset;  // bytes from the beginning of the box, unswizzled
  char* global;    // of element `first`; what lies outside has none
  int first, end;
};
uint32_t bytes_of(Element element);
uint32_t row_bytes(const TensorMap& map);
uint32_t box_bytes(const TensorMap& map);
std::vector<BoxRow> rows_of(const TensorMap& map, const std::array<int, kMaxRank>& at);
void add_elements(char* to, const char* from, int count, Element element);

// A bulk load into one block, counted down by an mbarrier of that block.
struct BulkLoad {
  TensorMap map;
  std::array<int, kMaxRank> at;
  int rank_of_block;
  uint32_t shared, barrier;  // addresses there
  Location here;
};

// A bulk store: it reads shared memory first and writes global memory later.
struct BulkStore {
  TensorMap map;
  std::array<int, kMaxRank> at;
  uint32_t shared;
  bool adds;
  Location here;
  std::vector<char> box;  // what was read; empty: not yet
  bool written = false;
};
struct BulkGroup {
  std::vector<BulkStore> stores;
};
// Of a thread, oldest first: groups go from `unread` to `unwritten` as waits say so.
struct BulkStores {
  BulkGroup open;
  std::vector<BulkGroup> unread, unwritten;
  uint32_t committed = 0;
};

// Register arrays that products of a thread have used, and when they were last touched otherwise.
struct RegisterArray {
  uintptr_t first, end;
  uint64_t touched = 0;
  bool sums_in_flight = false;
};
struct Registers {
  std::vector<RegisterArray> arrays;
  uint64_t clock = 0, fenced = 0;  // steps; the last wgmma.fence
};

// A warp's quarter of a product of its warpgroup: 16 rows of A, all of B.
struct WarpProduct {
  WgmmaShape shape;
  uint64_t a, b;  // descriptors
  bool accumulate, from_registers;
  std::array<float*, 32> d;
  std::array<const uint32_t*, 32> a_registers;
  std::array<std::array<uint32_t, 4>, 32> a_at_issue;
  Location here;
  bool done = false;
};
struct ProductGroup {
  std::vector<WarpProduct> products;
};
// Sums [16, N] that products are adding to; the registers hold NaN meanwhile.
struct Sums {
  int products = 0;  // that have not retired
  std::vector<float> value;
};
struct WarpProducts {
  ProductGroup open;
  std::vector<ProductGroup> groups;  // oldest first
  uint32_t committed = 0;
  bool fenced = false;                     // since the last commit
  std::map<const float*, Sums> in_flight;  // by the registers of lane 0
};

}  // namespace simt
