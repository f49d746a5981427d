// The kernels of attention_varlen_launch_sm90.h for bf16: a file per type, so that they compile
// side by side.
#include "kernels/attention_varlen_launch_sm90.h"

namespace fused_lm {

Status attention_varlen_sm90_bf16(const AttentionVarlenParams& params, int multiprocessors,
                                  int* tile_counter, Stream stream) {
  return attention_varlen::launch_any_varlen<__nv_bfloat16>(params, multiprocessors, tile_counter,
                                                            stream);
}

}  // namespace fused_lm
