// The kernels of gemm_launch_sm90.h for bf16: a file per type, so that they compile side by side.
#include "kernels/gemm_launch_sm90.h"

namespace fused_lm {

Status gemm_sm90_bf16(const GemmParams& params, Stream stream) {
  return gemm::launch_any<__nv_bfloat16>(params, stream);
}

}  // namespace fused_lm
