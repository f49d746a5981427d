// Tensor maps: what TMA knows of a tensor. Made on the host, given to kernels as
// `const __grid_constant__ ptx::TensorMap`.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include "common/tensor_layout.h"
#include "ptx/builtins.h"

namespace fused_lm {
namespace ptx {

// A CUtensorMap, which nobody looks into.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

}  // namespace ptx

constexpr CUtensorMapDataType tensor_map_type(DType dtype) {
  return dtype == DType::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

constexpr CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
  return swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                   : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// The driver's encoder, found at run time: the library must load where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  constexpr unsigned kCuda12 = 12000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             kCuda12, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

inline Status encode_tensor_map(ptx::TensorMap& map, const TensorLayout& layout) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (encode == nullptr) return "the driver is too old for tensor maps: CUDA 12 has them";
  cuuint64_t sizes[kMaxTensorRank], strides[kMaxTensorRank];
  cuuint32_t box[kMaxTensorRank], steps[kMaxTensorRank];
  for (int i = 0; i < layout.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(layout.sizes[i]);
    strides[i] = static_cast<cuuint64_t>(layout.strides[i]);
    box[i] = static_cast<cuuint32_t>(layout.box[i]);
    steps[i] = 1;
  }
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&map), tensor_map_type(layout.dtype),
      static_cast<cuuint32_t>(layout.rank), const_cast<void*>(layout.base), sizes, strides + 1, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor_map_swizzle(layout.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? kOk : "the driver refused a tensor map";
}

}  // namespace fused_lm
