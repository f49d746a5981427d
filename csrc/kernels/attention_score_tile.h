// Where the values of a tile of scores are, in the registers of a product's fragments.
//
// Forward and weights hold [T, S] tiles, the pass over keys of the backward [S, T] tiles: kKeyRows
// says that a fragment's rows are keys.
#pragma once

#include "kernels/attention_tile.h"

namespace fused_lm {

// The query and the key of each value that a thread holds: those of its first value, and constant
// steps from there.
template <bool kKeyRows>
struct ScoreTile {
  int t_first, s_first;
  int T, S;
  int batch, head;

  static __device__ __forceinline__ constexpr int t_step(int m, int n, int e) {
    return kKeyRows ? column_step(n, e) : row_step(m, e);
  }
  static __device__ __forceinline__ constexpr int s_step(int m, int n, int e) {
    return kKeyRows ? row_step(m, e) : column_step(n, e);
  }
  __device__ __forceinline__ int t(int m, int n, int e) const { return t_first + t_step(m, n, e); }
  __device__ __forceinline__ int s(int m, int n, int e) const { return s_first + s_step(m, n, e); }
  __device__ __forceinline__ bool inside(int m, int n, int e) const {
    return t(m, n, e) < T && s(m, n, e) < S;
  }

 private:
  static __device__ __forceinline__ constexpr int row_step(int m, int e) {
    return kMmaRows * m + e / 2 * 8;
  }
  static __device__ __forceinline__ constexpr int column_step(int n, int e) {
    return kMmaColumns * n + e % 2;
  }
};

// Calls body(m, n, e) for every value of a tile.
template <int kM, int kN, class Body>
__device__ __forceinline__ void for_each_value(const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < kFragment; ++e) body(m, n, e);
    }
  }
}

}  // namespace fused_lm
