// Linear layers with their activation on Hopper: what a registrar needs. Arguments and results are
// those of the schemas in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// x [N, C] -> y [N, F] and pre (empty unless keep_pre).
std::tuple<Tensor, Tensor> linear_act_fwd(const Tensor& x, const Tensor& weight,
                                          const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& weight_grad,
                                          const std::string& activation, bool transposed,
                                          bool keep_pre);

}  // namespace fused_lm
