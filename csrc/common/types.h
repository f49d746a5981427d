// Plain types that the torch-free side (kernels) and the torch side (csrc/*.cpp) share.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fused_lm {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

// Outcome of a launch: null, or a sentence that lives for ever.
using Status = const char*;
constexpr Status kOk = nullptr;

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

constexpr int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr int kWarpSize = 32;

// The dropout mask is keyed by (rng, batch, head, row, column), see common/philox.h.
struct DropoutParams {
  const int64_t* rng;  // [4] = (seed, offset, head offset, row offset), null: no dropout
  uint32_t threshold;  // 16-bit lanes below it are dropped, 0 .. 65536
  float scale;         // of kept values
};

}  // namespace fused_lm
