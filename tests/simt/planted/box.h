// A box of Maps in shared memory: 8 rows of 32 floats, swizzled, and the barriers of its copies.
#pragma once

#include "planted/case.h"

namespace planted {

constexpr int kBox = kBoxRows * kMapColumns;
constexpr uint32_t kBoxBytes = kBox * sizeof(float);

struct Tiles {
  alignas(1024) float tile[2][kBox];
  uint64_t full, empty;
};
constexpr size_t kTiles = sizeof(Tiles);

// Where swizzling puts float i of a box.
__device__ __forceinline__ int at(int i) {
  const int row = i / kMapColumns, chunk = i % kMapColumns / 4;
  return row * kMapColumns + (chunk ^ row) * 4 + i % 4;
}

}  // namespace planted
