// In which order the tiles of a matrix product are taken, and the element types of all kernels.
#pragma once

#include "kernels/gemm.h"
#include "ptx/builtins.h"

namespace fused_lm {
namespace gemm {

template <class Element>
constexpr DType kDTypeOf = std::is_same_v<Element, __half> ? DType::kFloat16 : DType::kBFloat16;

struct TileIndex {
  int m, n;
};

struct TileAt {
  int row, column;  // its first
};

// `group` rows of tiles side by side, column by column, so that those that run together share
// panels of a and b in the L2.
__device__ __forceinline__ TileIndex tile_in_groups(int tile, int tiles_m, int tiles_n, int group) {
  const int panel = group * tiles_n;
  const int first = tile / panel * group, inside = tile % panel;
  const int rows = min(group, tiles_m - first);
  return {first + inside % rows, inside / rows};
}

}  // namespace gemm
}  // namespace fused_lm
