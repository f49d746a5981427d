// The kernels of attention_fwd_launch_sm90.h for bf16: a file per type, so that they compile side
// by side.
#include "kernels/attention_fwd_launch_sm90.h"

namespace fused_lm {

Status attention_forward_sm90_bf16(const AttentionForwardParams& params, int multiprocessors,
                                   int* tile_counter, Stream stream) {
  return attention_fwd::launch_any_hopper<__nv_bfloat16>(params, multiprocessors, tile_counter,
                                                         stream);
}

}  // namespace fused_lm
