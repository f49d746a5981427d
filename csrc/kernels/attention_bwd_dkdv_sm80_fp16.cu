// dk and dv of attention_bwd_launch.h for fp16: a file per type, so that they compile side by side.
#include "kernels/attention_bwd_launch.h"

namespace fused_lm {

Status attention_dkdv_fp16(const AttentionBackwardParams& params, size_t shared_bytes,
                           Stream stream) {
  return attention_bwd::launch_dkdv<__half>(params, shared_bytes, stream);
}

}  // namespace fused_lm
