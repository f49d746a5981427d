// The kernels of attention_decode_sm80.h for bf16: a file per type, so that they compile side by
// side.
#include "kernels/attention_decode_sm80.h"

namespace fused_lm {

Status attention_decode_bf16(const AttentionDecodeParams& params, Stream stream) {
  return attention_decode::launch_any<__nv_bfloat16>(params, stream);
}

}  // namespace fused_lm
