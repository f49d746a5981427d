// The kernel of attention_dbias_sm80.h for fp16: a file per type, so that they compile side by
// side.
#include "kernels/attention_dbias_sm80.h"

namespace fused_lm {

Status attention_dbias_fp16(const AttentionDbiasParams& params, Stream stream) {
  return attention_dbias::launch_any<__half>(params, stream);
}

}  // namespace fused_lm
