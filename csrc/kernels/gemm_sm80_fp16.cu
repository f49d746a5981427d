// The kernels of gemm_launch_sm80.h for fp16: a file per type, so that they compile side by side.
#include "kernels/gemm_launch_sm80.h"

namespace fused_lm {

Status gemm_sm80_fp16(const GemmParams& params, Stream stream) {
  return gemm::launch_any_portable<__half>(params, stream);
}

}  // namespace fused_lm
