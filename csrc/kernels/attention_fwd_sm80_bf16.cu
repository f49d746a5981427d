// The kernels of attention_fwd_launch.h for bf16: a file per type, so that they compile side by
// side.
#include "kernels/attention_fwd_launch.h"

namespace fused_lm {

Status attention_forward_bf16(const AttentionForwardParams& params, size_t shared_bytes,
                              Stream stream) {
  return attention_fwd::launch_any<__nv_bfloat16>(params, shared_bytes, stream);
}

}  // namespace fused_lm
