// An operand of wgmma, [64, 16] of bf16, K-major: rows of 32 bytes, swizzled by as many.
#pragma once

#include "common/matrix_descriptor.h"
#include "ptx/memory.h"
#include "ptx/wgmma.h"

namespace planted {

constexpr int kOperandRows = 64, kOperandDepth = 16;

struct Operand {
  alignas(1024) uint16_t element[kOperandRows * kOperandDepth];

  __device__ __forceinline__ void set(int row, int k, float value) {
    const int chunk = k / 8 ^ (row / 4 % 2);
    element[row * kOperandDepth + chunk * 8 + k % 8] =
        static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
  __device__ __forceinline__ uint64_t descriptor() const {
    constexpr int kRowBytes = 2 * kOperandDepth;
    return fused_lm::matrix_descriptor(fused_lm::ptx::shared_address(element), 0, 8 * kRowBytes,
                                       fused_lm::Swizzle::k32);
  }
};
struct Operands {
  Operand a, b;
};

using Sums = float[8][4];

__device__ __forceinline__ void finish(Sums& d) {
  fused_lm::ptx::wgmma_commit();
  fused_lm::ptx::wgmma_wait<0>();
  fused_lm::ptx::registers_fence(d);
}

}  // namespace planted
