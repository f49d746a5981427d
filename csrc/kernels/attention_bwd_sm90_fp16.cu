// The kernels of attention_bwd_launch_sm90.h for fp16: a file per type, so that they compile side
// by side.
#include "kernels/attention_bwd_launch_sm90.h"

namespace fused_lm {

Status attention_backward_sm90_fp16(const AttentionBackwardParams& params,
                                    const HopperBackwardRoom& room, Stream stream) {
  if (hopper_backward_head_dim(params.shape) > kWideBackwardDim) {
    return attention_backward_wide_sm90_fp16(params, room, stream);
  }
  return attention_bwd::launch_hopper_backward<__half>(params, room, stream);
}

}  // namespace fused_lm
