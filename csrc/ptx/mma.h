// Tensor core products of one warp: d += a b, fp32 sums, a [16, 16] row-major, b [16, 8]
// column-major.
//
//   a: register 0 of lane l holds (l / 4, 2 (l % 4) + {0, 1}); register 1 is 8 rows below, 2 is 8
//      columns right, 3 is both. b: register 0 holds (2 (l % 4) + {0, 1}, l / 4), 1 is 8 rows
//      below.
//   d: 0, 1 hold (l / 4, 2 (l % 4) + {0, 1}); 2, 3 are 8 rows below.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.14, mma.m16n8k16 (sm_80).
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fused_lm::ptx
