// Attention inside each of several packed sequences as a torch operator: what a registrar needs.
// Arguments and results are those of the schema in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// q [N, H, D], k [M, Hkv, D], v [M, Hkv, Dv] -> out [N, H, Dv], lse [H, N].
std::tuple<Tensor, Tensor> attention_varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& cu_seqlens_q,
                                                const Tensor& cu_seqlens_k,
                                                std::optional<int64_t> lower,
                                                std::optional<int64_t> upper, bool aligned_at_end,
                                                double scale, double softcap);

// dq, dk and dv, contiguous; the last bits of dq differ from run to run.
std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, std::optional<int64_t> lower, std::optional<int64_t> upper,
    bool aligned_at_end, double scale, double softcap);

}  // namespace fused_lm
