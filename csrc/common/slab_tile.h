// Tiles of 16-bit rows as TMA brings them and wgmma reads them: slabs of 64 columns, a row of 128
// bytes each, side by side; of 32 columns where the tile's are no multiple of 64. Drawn in
// matrix_descriptor.h.
#pragma once

#include "common/matrix_descriptor.h"
#include "ptx/memory.h"

namespace fused_lm {

constexpr int kAtomRows = 8;
constexpr int kProductDepth = 16;  // what a wgmma of 16-bit types sums over

template <int kTileRows, int kTileColumns>
struct SlabTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr Swizzle kSwizzle = kColumns % 64 == 0 ? Swizzle::k128 : Swizzle::k64;
  static constexpr int kRowBytes = static_cast<int>(kSwizzle);
  static constexpr int kSlabColumns = kRowBytes / 2;
  static constexpr int kSlabs = kColumns / kSlabColumns;
  static constexpr int kSlabChunks = kRowBytes / 16;
  static constexpr uint32_t kSlabBytes = kRows * kRowBytes;
  static constexpr uint32_t kBytes = kSlabs * kSlabBytes;
  static constexpr uint32_t kAtomBytes = kAtomRows * kRowBytes;
  static_assert(kColumns % kSlabColumns == 0 && kRows % kAtomRows == 0);

  alignas(1024) uint4 chunks[kSlabs][kRows][kSlabChunks];

  // 8 columns, 16 bytes, of a row.
  __device__ __forceinline__ uint4* at(int row, int chunk) {
    const int flip = kSwizzle == Swizzle::k128 ? row % 8 : row / 2 % 4;
    return &chunks[chunk / kSlabChunks][row][chunk % kSlabChunks ^ flip];
  }

  // As an operand whose rows, from `row` on, are those of a or the columns of b; its columns are
  // summed over. `row` is a multiple of 8.
  __device__ __forceinline__ uint64_t k_major(int row) const {
    constexpr uint32_t kNotRead = 16;
    const uint32_t first = ptx::shared_address(&chunks[0][0][0]);
    return matrix_descriptor(first + row * kRowBytes, kNotRead, kAtomBytes, kSwizzle);
  }
  static __device__ __forceinline__ constexpr uint32_t k_step(int step) {
    constexpr int kStepBytes = 2 * kProductDepth, kSteps = kRowBytes / kStepBytes;
    return step / kSteps * kSlabBytes + step % kSteps * kStepBytes;
  }

  // As b whose columns are the tile's; its rows are summed over.
  __device__ __forceinline__ uint64_t mn_major() const {
    return matrix_descriptor(ptx::shared_address(&chunks[0][0][0]), kSlabBytes, kAtomBytes,
                             kSwizzle);
  }
  static __device__ __forceinline__ constexpr uint32_t mn_step(int step) {
    return step * kProductDepth * kRowBytes;
  }
};

}  // namespace fused_lm
