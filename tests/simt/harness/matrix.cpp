// ldmatrix, stmatrix, movmatrix and mma.sync, by the fragment layouts of PTX 9.7.14
// (csrc/ptx/matrix.h and mma.h draw them; tests hold them against CuTe's).
#include <cstring>

#include "harness/operands.h"
#include "harness/race.h"
#include "harness/state.h"
#include "harness/transactions.h"

namespace simt {
namespace {

constexpr int kRows = 8, kRowBytes = 16;

float half_of(uint32_t pair, int half, Half type) {
  return to_float(static_cast<uint16_t>(pair >> 16 * half), type);
}

struct MatrixRecord {
  uint32_t* registers;
  uint32_t address;  // of the row that this lane names
  int matrices;
  bool transposed, store;
  Location here;
};

// A lane reads the elements that it gets, whoever gave their row's address.
void check_races(const MatrixRecord& mine, int lane, const char* first, const char* second) {
  const int thread = self().agent - self().lane + lane;
  const Epoch epoch{static_cast<uint16_t>(thread), race().now(thread), mine.here};
  for (const char* p : {first, second}) {
    const auto offset = static_cast<uint32_t>(p - block().smem);
    race().access(block(), race().thread_view(thread), epoch, offset, 2, mine.store);
  }
}

// The two elements of matrix m that lane l holds, as bytes in shared memory.
void move_pair(MatrixRecord* const* records, int m, int lane) {
  char* base = block().smem - kSharedBase;
  const auto element = [&](int row, int column) {
    return base + records[m * kRows + row]->address + 2 * column;
  };
  const MatrixRecord& mine = *records[lane];
  const int major = lane / 4, minor = lane % 4 * 2;
  char* first = mine.transposed ? element(minor, major) : element(major, minor);
  char* second = mine.transposed ? element(minor + 1, major) : element(major, minor + 1);
  if (kRaceBuild) check_races(mine, lane, first, second);
  auto* halves = reinterpret_cast<char*>(&mine.registers[m]);
  memcpy(mine.store ? first : halves, mine.store ? halves : first, 2);
  memcpy(mine.store ? second : halves + 2, mine.store ? halves + 2 : second, 2);
}

void need_whole_warp(const char* kind, Location here) {
  if (self().warp * kWarpSize + kWarpSize <= block().threads) return;
  fail("%s at %s: the last warp of a block of %d threads is not whole", kind,
       to_string(here).c_str(), block().threads);
}

void move_matrices(MatrixRecord record, const void* row, const char* kind, Location here) {
  need_whole_warp(kind, here);
  if (self().lane < kRows * record.matrices) {  // the addresses of the other lanes don't count
    record.address = shared_address(row);
    checked_shared_offset(record.address, kRowBytes, kind, here);
    if (record.address % kRowBytes) {
      fail("%s at %s: row address 0x%x is not 16-byte aligned", kind, to_string(here).c_str(),
           record.address);
    }
  }
  warp_collective(
      kind, ~0u, &record,
      [](void** lanes, uint32_t) {
        auto* const* records = reinterpret_cast<MatrixRecord**>(lanes);
        uint32_t rows[kWarpSize];
        for (int lane = 0; lane < kWarpSize; ++lane) rows[lane] = records[lane]->address;
        count_matrix_rows(rows, records[0]->matrices);
        for (int m = 0; m < records[0]->matrices; ++m) {
          for (int lane = 0; lane < kWarpSize; ++lane) move_pair(records, m, lane);
        }
      },
      here);
}

// Row l / 4, columns 2 (l % 4) and the next, of lane l; turned, the same place of the transpose.
void transpose(void** lanes, uint32_t) {
  auto* const* values = reinterpret_cast<uint32_t**>(lanes);
  uint32_t element[kRows][kRows];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int half = 0; half < 2; ++half) {
      element[lane / 4][lane % 4 * 2 + half] = *values[lane] >> 16 * half & 0xffffu;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    *values[lane] = element[column][row] | element[column + 1][row] << 16;
  }
}

struct MmaRecord {
  float* d;
  const uint32_t *a, *b;
  Half type;
};

void multiply(void** lanes, uint32_t) {
  constexpr int M = 16, N = 8, K = 16;
  float a[M][K], b[K][N], d[M][N];
  auto* const* records = reinterpret_cast<MmaRecord**>(lanes);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaRecord& r = *records[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = half_of(r.a[i], half, r.type);
      }
      for (int i = 0; i < 2; ++i) {
        b[pair + i * 8 + half][group] = half_of(r.b[i], half, r.type);
        d[group + i * 8][pair + half] = r.d[2 * i + half];
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < N; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      records[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
  counters.mma_flops += 2 * M * N * K;
}

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Location here) {
  move_matrices({registers, 0, matrices, transposed, false, here}, row, "ldmatrix", here);
}

void stmatrix(const uint32_t* registers, void* row, int matrices, bool transposed, Location here) {
  move_matrices({const_cast<uint32_t*>(registers), 0, matrices, transposed, true, here}, row,
                "stmatrix", here);
}

uint32_t movmatrix(uint32_t value, Location here) {
  need_whole_warp("movmatrix", here);
  warp_collective("movmatrix", ~0u, &value, transpose, here);
  return value;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type, Location here) {
  need_whole_warp("mma.sync", here);
  MmaRecord record{d, a, b, type};
  warp_collective("mma.sync", ~0u, &record, multiply, here);
}

}  // namespace simt
