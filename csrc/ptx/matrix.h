// 8x8 matrices between shared memory and registers. All 32 lanes take part; lane 8 m + r gives the
// 16-byte aligned address of row r of matrix m: `rows`, lane_off and fixed_off bytes further on.
// Afterwards register m of lane l holds elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of
// matrix m, of its transpose with _trans.
//
// fixed_off is a constant. Added inside of the assembly it becomes part of the instruction; added
// outside of it, every address of an unrolled loop is computed before the loop, and kept.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

// PTX 9.7.14, ldmatrix (sm_75).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* rows,
                                            uint32_t lane_off = 0, uint32_t fixed_off = 0) {
  asm volatile(
      "{ .reg .u32 row; add.u32 row, %4, %5;\n"
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [row]; }"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(shared_address(rows) + lane_off), "r"(fixed_off)
      : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* rows,
                                                  uint32_t lane_off = 0, uint32_t fixed_off = 0) {
  asm volatile(
      "{ .reg .u32 row; add.u32 row, %4, %5;\n"
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [row]; }"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(shared_address(rows) + lane_off), "r"(fixed_off)
      : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* rows,
                                            uint32_t lane_off = 0, uint32_t fixed_off = 0) {
  asm volatile(
      "{ .reg .u32 row; add.u32 row, %2, %3;\n"
      "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [row]; }"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(shared_address(rows) + lane_off), "r"(fixed_off)
      : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* rows,
                                                  uint32_t lane_off = 0, uint32_t fixed_off = 0) {
  asm volatile(
      "{ .reg .u32 row; add.u32 row, %2, %3;\n"
      "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [row]; }"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(shared_address(rows) + lane_off), "r"(fixed_off)
      : "memory");
}

// PTX 9.7.14, movmatrix (sm_75): the transpose of a matrix that lies in registers as above.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t r) {
  uint32_t moved;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(moved) : "r"(r));
  return moved;
}

// PTX 9.7.14, stmatrix (sm_90).
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fused_lm::ptx
