// LayerNorm and RMSNorm as torch operators: what a registrar needs. Arguments and results are
// those of the schemas in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), mean [N], rstd [N].
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& rng, double eps,
    double dropout_p, ScalarType out_dtype, ScalarType residual_dtype);

// Gradients (dx, dresidual, dweight, dbias); dresidual is empty where it would equal dx.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& dy, const std::optional<Tensor>& dstream, const Tensor& stream,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
    const Tensor& rstd, const std::optional<Tensor>& rng, double dropout_p, ScalarType x_dtype,
    std::optional<ScalarType> residual_dtype);

// x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), rstd [N].
std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x,
                                                const std::optional<Tensor>& residual,
                                                const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& rng, double eps,
                                                double dropout_p, ScalarType out_dtype,
                                                ScalarType residual_dtype);

// Gradients (dx, dresidual, dweight); dresidual is empty where it would equal dx.
std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(
    const Tensor& dy, const std::optional<Tensor>& dstream, const Tensor& stream,
    const std::optional<Tensor>& weight, const Tensor& rstd, const std::optional<Tensor>& rng,
    double dropout_p, ScalarType x_dtype, std::optional<ScalarType> residual_dtype);

}  // namespace fused_lm
