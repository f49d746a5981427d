// Launches and dynamic shared memory: the two things of CUDA C++ that g++ has no syntax for.
#pragma once

#include <cstddef>

#include "common/types.h"
#include "ptx/builtins.h"

namespace fused_lm {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem_bytes;  // dynamic shared memory, sizeof(SharedStorage)
  Stream stream;
};

// The block's one shared structure. A kernel names it once; its size goes into LaunchConfig.
template <class SharedStorage>
__device__ __forceinline__ SharedStorage& dynamic_smem() {
  // A comment in the PTX: what build_tools/compiled.py reads the size of a launch from.
  asm volatile("// fused_lm_shared_bytes %0" ::"n"(sizeof(SharedStorage)));
  extern __shared__ __align__(1024) unsigned char fused_lm_dynamic_smem[];
  return *reinterpret_cast<SharedStorage*>(fused_lm_dynamic_smem);
}

// Shared memory that every kernel may have without asking.
constexpr size_t kDefaultSmemBytes = 48 * 1024;

// Launches kernel(args...); args are converted to the kernel's parameter types. Errors of the
// launch itself come back, errors of the running kernel at the next synchronisation.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... args) {
  if (config.smem_bytes > kDefaultSmemBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.smem_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = config.stream;
  const cudaError_t error =
      cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(args)...);
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

}  // namespace fused_lm
