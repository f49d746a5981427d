// Linear layers with their activation: what a registrar needs. Arguments and results are
// those of the schemas in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// x [N, C] -> y [N, F] and pre [N, F] (gated: [N, 2 F]; empty unless keep_pre).
std::tuple<Tensor, Tensor> linear_act_fwd(const Tensor& x, const Tensor& weight,
                                          const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& weight_grad,
                                          const std::string& activation, bool transposed,
                                          bool keep_pre);

// Gradients (dx, dweight, dbias), empty where not needed.
std::tuple<Tensor, Tensor, Tensor> linear_act_bwd(const Tensor& dy, const Tensor& x,
                                                  const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const Tensor& pre, const std::string& activation,
                                                  bool transposed, bool needs_dx, bool needs_dbias,
                                                  bool needs_dweight);

// The same; dweight is added into weight_grad and then empty.
std::tuple<Tensor, Tensor, Tensor> linear_act_bwd_add(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& pre, const std::string& activation, bool transposed, bool needs_dx,
    bool needs_dbias, bool needs_dweight, const Tensor& weight_grad);

// x [N, C], residual [N, F], like x or fp32 -> y = residual + dropout(x W^T + b), of its dtype.
Tensor linear_residual_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& residual, const std::optional<Tensor>& rng,
                           double dropout_p, bool transposed);

// Gradients (dx, dweight, dbias), empty where not needed; the residual's is dy.
std::tuple<Tensor, Tensor, Tensor> linear_residual_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& rng, double dropout_p, bool transposed, bool needs_dx,
    bool needs_dbias, bool needs_dweight);

}  // namespace fused_lm
