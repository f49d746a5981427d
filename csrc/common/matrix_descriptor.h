// The 64 bits by which wgmma finds an operand in shared memory.
//
//   bits 0..13: address / 16     16..29: leading_bytes / 16     32..45: stride_bytes / 16
//   bits 62, 63: swizzle, 0 none, 1: 128 bytes, 2: 64, 3: 32
//
// A product of 16 steps reads [rows, 16] of a and [columns, 16] of b, 16 being the K that is summed
// over. Memory is made of atoms, 8 rows of W bytes, where W is the swizzle's 128, 64 or 32; TMA
// writes a box whose rows have W bytes as atoms one below the other, a "slab". Atoms begin at
// multiples of 8 W. Within an atom chunk c (16 bytes) of row r lies at c ^ (r % 8) for 128 bytes,
// c ^ (r / 2 % 4) for 64, c ^ (r / 4 % 2) for 32.
//
// K-major, a row of memory is along K (q, k for q k^T): W / 32 products per atom row.
//
//               K ->
//        MN   +--------+   stride_bytes: from an atom to the one below it, 8 rows further: 8 W in
//        |    | atom 0 |     a slab.
//        v    +--------+   leading_bytes: not read.
//             | atom 1 |   The next 16 of K: address + 32, in the next slab after W / 32 of them.
//             +--------+
//
// MN-major, a row of memory is along M or N (v for p v): 16 rows, two atoms, per product.
//
//              MN ->
//        K    +--------+--------+   leading_bytes: from an atom to the one right of it, W bytes of
//        |    | atom 0 | slab 1 |     MN further: the bytes of a slab.
//        v    +--------+--------+   stride_bytes: to the one below, 8 of K further: 8 W.
//             | atom 1 |        |   The next 16 of K: address + 16 W.
//             +--------+--------+
//
// Source: PTX 9.7.15.5, asynchronous warpgroup level matrix shared memory layout.
#pragma once

#include <cstdint>

#include "common/tensor_layout.h"
#include "ptx/builtins.h"

namespace fused_lm {

__device__ __forceinline__ constexpr uint64_t descriptor_field(uint32_t bytes) {
  return (bytes & 0x3ffffu) >> 4;
}

__device__ __forceinline__ constexpr uint64_t matrix_descriptor(uint32_t shared_address,
                                                                uint32_t leading_bytes,
                                                                uint32_t stride_bytes,
                                                                Swizzle swizzle) {
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return descriptor_field(shared_address) | descriptor_field(leading_bytes) << 16 |
         descriptor_field(stride_bytes) << 32 | mode << 62;
}

// The same operand `bytes` further on. No other field changes: shared memory ends below 256 KB.
__device__ __forceinline__ constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace fused_lm
