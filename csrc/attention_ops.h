// Softmax attention as torch operators: what a registrar needs. Arguments and results are those of
// the schemas in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> out [B, H, T, Dv], lse [B, H, T].
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& mask,
                                         const std::optional<Tensor>& key_mask,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& rng,
                                         std::optional<int64_t> lower, std::optional<int64_t> upper,
                                         double scale, double softcap, double dropout_p);

// Gradients (dq, dk, dv, dbias); dbias is empty unless wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& rng, std::optional<int64_t> lower, std::optional<int64_t> upper,
    double scale, double softcap, double dropout_p, bool needs_dbias);

// lse [B, H, T] of a forward -> [B, H, T, S], or its mean over heads [B, T, S].
Tensor attention_weights_fwd(const Tensor& q, const Tensor& k, const Tensor& lse,
                             const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& key_mask,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& rng,
                             std::optional<int64_t> lower, std::optional<int64_t> upper,
                             double scale, double softcap, double dropout_p, bool average_heads);

}  // namespace fused_lm
