// The kernels of attention_bwd_dkdv_sm80.h for fp16: a file per type, so that they compile side by
// side.
#include "kernels/attention_bwd_dkdv_sm80.h"

namespace fused_lm {

Status attention_dkdv_fp16(const AttentionBackwardParams& params, Stream stream) {
  return attention_dkdv::launch_any<__half>(params, stream);
}

}  // namespace fused_lm
