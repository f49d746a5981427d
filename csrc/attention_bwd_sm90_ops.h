// The backward of softmax attention on Hopper: what a registrar needs.
#pragma once

#include "attention_ops.h"

namespace fused_lm {

// For dq_slots: as many as attention_bwd_order_sm90.h finds best.
constexpr int64_t kSlotsByTuning = -1;

// attention_bwd, but on a Hopper GPU in one pass where its kernels take the tensors. With dq_slots
// of 0 the last bits of dq differ there from run to run; otherwise they repeat: tiles of keys go in
// launches of so many, each of which has sums of dq of its own.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_sm90(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& rng, std::optional<int64_t> lower, std::optional<int64_t> upper,
    double scale, double softcap, double dropout_p, bool needs_dbias, int64_t dq_slots);

}  // namespace fused_lm
