// Cross entropy as torch operators: what a registrar needs. Arguments and results are those of the
// schemas in fused_lm/ops/schemas.py, without the backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fused_lm {

using torch::stable::Tensor;

// logits [N, V], target [N] -> loss ([N], or [] reduced), dlogits [N, V] of a loss of 1 each, empty
// unless gradient is "with the loss".
std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target,
                                             int64_t ignore_index, double label_smoothing,
                                             double z_loss, double softcap,
                                             const std::string& reduction,
                                             const std::string& gradient);

// dlogits [N, V] of dloss ([N], or [] reduced).
Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                         int64_t ignore_index, double label_smoothing, double z_loss,
                         double softcap, const std::string& reduction);

// The same into the memory of the logits.
void cross_entropy_bwd_in_place(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                                int64_t ignore_index, double label_smoothing, double z_loss,
                                double softcap, const std::string& reduction);

// Fills loss [N]; with a gradient overwrites the logits with it, each row times its weight.
void cross_entropy_rows_in_place(const Tensor& logits, const Tensor& target, const Tensor& loss,
                                 const std::optional<Tensor>& weights, int64_t ignore_index,
                                 double label_smoothing, double z_loss, double softcap,
                                 bool gradient);

// dlogits [N, V] *= dloss, [] or [N].
void cross_entropy_scale_in_place(const Tensor& dlogits, const Tensor& dloss);

}  // namespace fused_lm
