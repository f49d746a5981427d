// Zeros in global memory, in the order of a stream: what a kernel behind it counts on.
#pragma once

#include <cstddef>

#include "common/types.h"
#include "ptx/builtins.h"

namespace fused_lm {

inline Status zero_async(void* p, size_t bytes, Stream stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, stream);
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

}  // namespace fused_lm
