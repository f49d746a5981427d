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

}  // namespace fused_lm
