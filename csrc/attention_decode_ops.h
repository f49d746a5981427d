// Attention to a KV cache as a torch operator: what a registrar needs. Arguments and results are
// those of the schema in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// q [B, H, T, D], caches [B, Hkv, S, D or Dv] -> out [B, H, T, Dv], lse [B, H, T].
std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q, const Tensor& k_cache,
                                                const Tensor& v_cache, const Tensor& cache_lens,
                                                const std::optional<Tensor>& block_table,
                                                std::optional<int64_t> lower,
                                                std::optional<int64_t> upper, double scale,
                                                double softcap);

}  // namespace fused_lm
