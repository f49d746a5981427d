// Tensor core products of a warpgroup, asynchronous (sm_90a): d += a b, fp32 sums, a [64, 16],
// b [16, N].
//
// Warp w of the four holds rows 16 w .. 16 w + 15 of d and, where a is in registers, of a, each as
// ptx/mma.h has it: d[n] are the columns from 8 n on. b, and a elsewhere, lie in shared memory,
// where a descriptor finds them: common/matrix_descriptor.h.
//
//   wgmma_fence();  products of one batch;  wgmma_commit();  ...  wgmma_wait<0>();
//   registers_fence(d);
//
// From its product to its wait nobody may touch d, nor write a.
#pragma once

#include <type_traits>

#include "ptx/builtins.h"

namespace fused_lm::ptx {

// PTX 9.7.15.7.1, wgmma.fence: before a batch, if registers of it were touched since the last one.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// PTX 9.7.15.7.2, wgmma.commit_group: closes a batch.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// PTX 9.7.15.7.3, wgmma.wait_group: at most kPending batches are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler moves no use of d across it.
template <int kN>
__device__ __forceinline__ void registers_fence(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}

// Which of an operand's dimensions is contiguous in shared memory: the 16 that are summed over, or
// the rows of a, the columns of b.
enum class Major : int { kK = 0, kMn = 1 };

template <class Element, int N>
struct Wgmma;

// Operands of d, 16 columns at a time: their numbers in the text, and their registers.
#define FUSED_LM_TEXT_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSED_LM_TEXT_64 \
  FUSED_LM_TEXT_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_LM_TEXT_80 FUSED_LM_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FUSED_LM_TEXT_96 FUSED_LM_TEXT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FUSED_LM_TEXT_112 FUSED_LM_TEXT_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FUSED_LM_TEXT_128 FUSED_LM_TEXT_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_LM_TEXT_144 FUSED_LM_TEXT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FUSED_LM_TEXT_160 FUSED_LM_TEXT_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FUSED_LM_TEXT_176 FUSED_LM_TEXT_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FUSED_LM_TEXT_192 FUSED_LM_TEXT_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FUSED_LM_TEXT_256                                                                        \
  FUSED_LM_TEXT_192                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126"   \
  ", %127"
#define FUSED_LM_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FUSED_LM_D16(n) FUSED_LM_D8(n), FUSED_LM_D8(n + 1)
#define FUSED_LM_D32(n) FUSED_LM_D16(n), FUSED_LM_D16(n + 2)
#define FUSED_LM_D64(n) FUSED_LM_D32(n), FUSED_LM_D32(n + 4)
#define FUSED_LM_REGISTERS_32 FUSED_LM_D32(0)
#define FUSED_LM_REGISTERS_64 FUSED_LM_D64(0)
#define FUSED_LM_REGISTERS_80 FUSED_LM_REGISTERS_64, FUSED_LM_D16(8)
#define FUSED_LM_REGISTERS_96 FUSED_LM_REGISTERS_80, FUSED_LM_D16(10)
#define FUSED_LM_REGISTERS_112 FUSED_LM_REGISTERS_96, FUSED_LM_D16(12)
#define FUSED_LM_REGISTERS_128 FUSED_LM_REGISTERS_112, FUSED_LM_D16(14)
#define FUSED_LM_REGISTERS_144 FUSED_LM_REGISTERS_128, FUSED_LM_D16(16)
#define FUSED_LM_REGISTERS_160 FUSED_LM_REGISTERS_144, FUSED_LM_D16(18)
#define FUSED_LM_REGISTERS_176 FUSED_LM_REGISTERS_160, FUSED_LM_D16(20)
#define FUSED_LM_REGISTERS_192 FUSED_LM_REGISTERS_176, FUSED_LM_D16(22)
#define FUSED_LM_REGISTERS_256 FUSED_LM_REGISTERS_192, FUSED_LM_D64(24)

// Both kinds of product of one N and type. i0 .. i6 are the numbers of the operands behind d: a, b,
// accumulate and what is major, a being one or four of them.
#define FUSED_LM_WGMMA_OF(element, type, N, i0, i1, i2, i3, i4, i5, i6)                           \
  template <>                                                                                     \
  struct Wgmma<element, N> {                                                                      \
    template <Major kMajorA, Major kMajorB>                                                       \
    static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b,       \
                                              bool accumulate) {                                  \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #i2                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                \
                   " {" FUSED_LM_TEXT_##N "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 "; }" \
                   : FUSED_LM_REGISTERS_##N                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                           \
                     "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB)));             \
    }                                                                                             \
    template <Major kMajorB>                                                                      \
    static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4],       \
                                              uint64_t b, bool accumulate) {                      \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #i5                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                \
                   " {" FUSED_LM_TEXT_##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4    \
                                          ", p, 1, 1, %" #i6 "; }"                                \
                   : FUSED_LM_REGISTERS_##N                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
                     "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)));          \
    }                                                                                             \
  };
#define FUSED_LM_WGMMA(N, ...)                             \
  FUSED_LM_WGMMA_OF(__nv_bfloat16, "bf16", N, __VA_ARGS__) \
  FUSED_LM_WGMMA_OF(__half, "f16", N, __VA_ARGS__)

FUSED_LM_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
FUSED_LM_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
FUSED_LM_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
FUSED_LM_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
FUSED_LM_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
FUSED_LM_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
FUSED_LM_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
FUSED_LM_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
FUSED_LM_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
FUSED_LM_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
FUSED_LM_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

// PTX 9.7.15.5, wgmma.mma_async: a by its descriptor. Without accumulate, d = a b.
template <class Element, int N, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 8][4], uint64_t a, uint64_t b,
                                         bool accumulate) {
  Wgmma<Element, N>::template ss<kMajorA, kMajorB>(d, a, b, accumulate);
}

// PTX 9.7.15.5, wgmma.mma_async: a in registers, K-major.
template <class Element, int N, Major kMajorB>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
  Wgmma<Element, N>::template rs<kMajorB>(d, a, b, accumulate);
}

}  // namespace fused_lm::ptx
