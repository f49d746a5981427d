// The feed-forward network, what linear_act_ops.h doesn't have of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// Back through the second layer and the activation: dpre [N, F] = (dy W) act'(pre), and the sums of
// its rows [F], empty where not needed. dy [N, C], pre [N, F]; for relu the hidden activations are
// as good as pre. Gated, pre, dpre and the sums are [N, 2 F] and [2 F].
std::tuple<Tensor, Tensor> ffn_dpre(const Tensor& dy, const Tensor& weight, const Tensor& pre,
                                    const std::string& activation, bool transposed,
                                    bool needs_dbias);

}  // namespace fused_lm
