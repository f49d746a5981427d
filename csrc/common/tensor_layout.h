// How a tensor lies in global memory and which box of it one copy moves: what a tensor map for TMA
// is made of.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fused_lm {

// How TMA permutes the 16-byte chunks of a box's rows in shared memory, by the bytes of a row that
// take part: address bits 4.. are xored with bits 7.., three of them at 128, two at 64, one at 32.
// So eight rows that are read at the same column fall into different banks.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

constexpr int kMaxTensorRank = 5;

// Innermost dimension first. Outside of the sizes a load reads zeros and a store writes nothing.
struct TensorLayout {
  const void* base;  // aligned to 16 bytes
  DType dtype;
  int rank;                         // 1 .. 5
  int64_t sizes[kMaxTensorRank];    // elements, 1 .. 2^32
  int64_t strides[kMaxTensorRank];  // bytes, multiples of 16 below 2^40; [0] is not read: adjacent
  int box[kMaxTensorRank];          // elements, up to 256; rows of at most the swizzle's bytes
  Swizzle swizzle;
};

}  // namespace fused_lm
