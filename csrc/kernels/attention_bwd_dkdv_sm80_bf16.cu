// The kernels of attention_bwd_dkdv_sm80.h for bf16: a file per type, so that they compile side by
// side.
#include "kernels/attention_bwd_dkdv_sm80.h"

namespace fused_lm {

Status attention_dkdv_bf16(const AttentionBackwardParams& params, Stream stream) {
  return attention_dkdv::launch_any<__nv_bfloat16>(params, stream);
}

}  // namespace fused_lm
