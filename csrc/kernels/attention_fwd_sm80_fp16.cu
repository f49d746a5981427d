// The kernels of attention_fwd_sm80.h for fp16: a file per type, so that they compile side by side.
#include "kernels/attention_fwd_sm80.h"

namespace fused_lm {

Status attention_forward_fp16(const AttentionForwardParams& params, Stream stream) {
  return attention_fwd::launch_any<__half>(params, stream);
}

}  // namespace fused_lm
