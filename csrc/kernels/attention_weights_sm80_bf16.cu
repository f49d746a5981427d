// The kernel of attention_weights_sm80.h for bf16: a file per type, so that they compile side by
// side.
#include "kernels/attention_weights_sm80.h"

namespace fused_lm {

Status attention_weights_bf16(const AttentionWeightsParams& params, Stream stream) {
  return attention_weights::launch_any<__nv_bfloat16>(params, stream);
}

}  // namespace fused_lm
