// dq of attention_bwd_launch.h for bf16: a file per type, so that they compile side by side.
#include "kernels/attention_bwd_launch.h"

namespace fused_lm {

Status attention_dq_bf16(const AttentionBackwardParams& params, size_t shared_bytes,
                         Stream stream) {
  return attention_bwd::launch_dq<__nv_bfloat16>(params, shared_bytes, stream);
}

}  // namespace fused_lm
