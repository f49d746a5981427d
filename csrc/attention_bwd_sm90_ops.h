// The backward of softmax attention on Hopper: what a registrar needs.
#pragma once

#include "attention_ops.h"

namespace fused_lm {

// attention_bwd, but on a Hopper GPU in one pass where its kernels take the tensors: there the last
// bits of dq differ from run to run.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_sm90(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& rng, std::optional<int64_t> lower, std::optional<int64_t> upper,
    double scale, double softcap, double dropout_p, bool needs_dbias);

}  // namespace fused_lm
