// The kernels of attention_fwd_launch.h for fp16: a file per type, so that they compile side by
// side.
#include "kernels/attention_fwd_launch.h"

namespace fused_lm {

Status attention_forward_fp16(const AttentionForwardParams& params, size_t shared_bytes,
                              Stream stream) {
  return attention_fwd::launch_any<__half>(params, shared_bytes, stream);
}

}  // namespace fused_lm
