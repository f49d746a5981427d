// The operators of csrc on CPU tensors, in a library of their own for each build of the harness.
#include <torch/csrc/stable/library.h>

#include "attention_bwd_sm90_ops.h"
#include "attention_decode_ops.h"
#include "attention_ops.h"
#include "attention_varlen_ops.h"
#include "cross_entropy_ops.h"
#include "ffn_ops.h"
#include "layernorm_ops.h"
#include "linear_act_ops.h"

STABLE_TORCH_LIBRARY_IMPL(SIMT_LIBRARY, CPU, m) {
  m.impl("cuda_attention_fwd", TORCH_BOX(&fused_lm::attention_fwd));
  m.impl("cuda_attention_bwd", TORCH_BOX(&fused_lm::attention_bwd));
  m.impl("cuda_attention_bwd_sm90", TORCH_BOX(&fused_lm::attention_bwd_sm90));
  m.impl("cuda_attention_weights_fwd", TORCH_BOX(&fused_lm::attention_weights_fwd));
  m.impl("cuda_attention_decode_fwd", TORCH_BOX(&fused_lm::attention_decode_fwd));
  m.impl("cuda_attention_varlen_fwd", TORCH_BOX(&fused_lm::attention_varlen_fwd));
  m.impl("cuda_attention_varlen_bwd", TORCH_BOX(&fused_lm::attention_varlen_bwd));
  m.impl("cuda_cross_entropy_fwd", TORCH_BOX(&fused_lm::cross_entropy_fwd));
  m.impl("cuda_cross_entropy_bwd", TORCH_BOX(&fused_lm::cross_entropy_bwd));
  m.impl("cuda_cross_entropy_bwd_in_place", TORCH_BOX(&fused_lm::cross_entropy_bwd_in_place));
  m.impl("cuda_cross_entropy_rows_in_place", TORCH_BOX(&fused_lm::cross_entropy_rows_in_place));
  m.impl("cuda_cross_entropy_scale_in_place", TORCH_BOX(&fused_lm::cross_entropy_scale_in_place));
  m.impl("cuda_layer_norm_fwd", TORCH_BOX(&fused_lm::layer_norm_fwd));
  m.impl("cuda_layer_norm_bwd", TORCH_BOX(&fused_lm::layer_norm_bwd));
  m.impl("cuda_rms_norm_fwd", TORCH_BOX(&fused_lm::rms_norm_fwd));
  m.impl("cuda_rms_norm_bwd", TORCH_BOX(&fused_lm::rms_norm_bwd));
  m.impl("cuda_linear_act_fwd", TORCH_BOX(&fused_lm::linear_act_fwd));
  m.impl("cuda_linear_act_bwd", TORCH_BOX(&fused_lm::linear_act_bwd));
  m.impl("cuda_ffn_dpre", TORCH_BOX(&fused_lm::ffn_dpre));
  m.impl("cuda_linear_act_bwd_add", TORCH_BOX(&fused_lm::linear_act_bwd_add));
  m.impl("cuda_linear_residual_fwd", TORCH_BOX(&fused_lm::linear_residual_fwd));
  m.impl("cuda_linear_residual_bwd", TORCH_BOX(&fused_lm::linear_residual_bwd));
}
