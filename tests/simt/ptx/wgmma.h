// Host twin of csrc/ptx/wgmma.h.
#pragma once

#include <type_traits>

#include "ptx/builtins.h"

namespace fused_lm::ptx {

inline void wgmma_fence(SIMT_HERE) { ::simt::wgmma_fence(here); }
inline void wgmma_commit(SIMT_HERE) { ::simt::wgmma_commit(here); }
template <int kPending>
void wgmma_wait(SIMT_HERE) {
  ::simt::wgmma_wait(kPending, here);
}
template <int kN>
void registers_fence(float (&d)[kN][4]) {}

enum class Major : int { kK = 0, kMn = 1 };

template <class Element, int N, Major kMajorA, Major kMajorB>
constexpr ::simt::WgmmaShape wgmma_shape() {
  constexpr auto kType =
      std::is_same_v<Element, __nv_bfloat16> ? ::simt::Half::kBFloat16 : ::simt::Half::kFloat16;
  return {N, kType, kMajorA == Major::kMn, kMajorB == Major::kMn};
}
template <class Element, int N, Major kMajorA, Major kMajorB>
void wgmma_ss(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate, SIMT_HERE) {
  ::simt::wgmma(wgmma_shape<Element, N, kMajorA, kMajorB>(), d[0], nullptr, a, b, accumulate, here);
}
template <class Element, int N, Major kMajorB>
void wgmma_rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              SIMT_HERE) {
  ::simt::wgmma(wgmma_shape<Element, N, Major::kK, kMajorB>(), d[0], a, 0, b, accumulate, here);
}

}  // namespace fused_lm::ptx
