// The kernels of attention_varlen_bwd_launch_sm90.h for fp16: a file per type, so that they compile
// side by side.
#include "kernels/attention_varlen_bwd_launch_sm90.h"

namespace fused_lm {

Status attention_varlen_backward_sm90_fp16(const AttentionVarlenBackwardParams& params,
                                           const HopperBackwardRoom& room, Stream stream) {
  return attention_bwd::launch_packed_backward<__half>(params, room, stream);
}

}  // namespace fused_lm
