// The backward of attention inside each of several packed sequences: checks, allocation, launches.
// What fused_lm/reference/attention_varlen.py computes one sequence after the other.
#include "kernels/attention_varlen_bwd.h"

#include <tuple>

#include "attention_varlen_ops.h"
#include "common/device.h"
#include "packed.h"
#include "shared_memory.h"

namespace fused_lm {
namespace {

void check_outputs(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out,
                   const Tensor& lse, const Tensor& q, int64_t Dv) {
  for (const Tensor& t : {dout, out}) {
    check_device(t, q, "out and dout");
    check_dtype(t, q.scalar_type(), "out and dout");
    STD_TORCH_CHECK(
        t.dim() == 3 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == Dv,
        "out and dout must be [N, H, Dv]");
  }
  const auto check_rows = [&](const Tensor& t) {
    check_device(t, q, "lse and dlse");
    check_dtype(t, ScalarType::Float, "lse and dlse");
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == q.size(1) && t.size(1) == q.size(0),
                    "lse and dlse must be [H, N]");
  };
  check_rows(lse);
  if (dlse) check_rows(*dlse);
}

Tensor gradient_of(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

// Shape and scores, as of one sequence.
void set_scores(AttentionBackwardParams& p, const Tensor& q, const Tensor& k, int64_t Dv,
                std::optional<int64_t> lower, std::optional<int64_t> upper, double scale,
                double softcap) {
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  p.shape = {1,
             narrow(q.size(1)),
             narrow(q.size(1) / k.size(1)),
             narrow(q.size(0)),
             narrow(k.size(0)),
             narrow(q.size(2)),
             narrow(Dv)};
  p.score.lower = varlen_bound(lower, -kMaxVarlenRows);
  p.score.upper = varlen_bound(upper, kMaxVarlenRows);
  p.score.scale = static_cast<float>(scale);
  p.score.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  p.score.softcap = static_cast<float>(softcap);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& given_dout, const OptionalTensor& dlse, const Tensor& given_q,
    const Tensor& given_k, const Tensor& given_v, const Tensor& given_out, const Tensor& given_lse,
    const Tensor& given_bounds_q, const Tensor& given_bounds_k, std::optional<int64_t> lower,
    std::optional<int64_t> upper, bool aligned_at_end, double scale, double softcap) {
  check_packed(given_q, given_k, given_v);
  const int64_t sequences = check_bounds(given_bounds_q, given_bounds_k, given_q);
  const int64_t Dv = given_v.size(2);
  check_outputs(given_dout, dlse, given_out, given_lse, given_q, Dv);
  Tensor dq = gradient_of(given_q), dk = gradient_of(given_k), dv = gradient_of(given_v);
  if (given_q.size(0) * given_q.size(1) == 0 || given_k.size(0) == 0) {
    return {torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv)};
  }
  const Tensor q = mapped(given_q), k = mapped(given_k), v = mapped(given_v);
  const Tensor out = mapped(given_out), dout = mapped(given_dout);
  const Tensor lse = torch::stable::contiguous(given_lse);
  const Tensor bounds_q = torch::stable::contiguous(given_bounds_q);
  const Tensor bounds_k = torch::stable::contiguous(given_bounds_k);
  AttentionVarlenBackwardParams params{};
  AttentionBackwardParams& p = params.p;
  set_scores(p, q, k, Dv, lower, upper, scale, softcap);
  p.q = halves(q), p.q_strides = packed_strides(q);
  p.k = halves(k), p.k_strides = packed_strides(k);
  p.v = halves(v), p.v_strides = packed_strides(v);
  p.out = halves(out), p.out_strides = packed_strides(out);
  p.dout = halves(dout), p.dout_strides = packed_strides(dout);
  p.dq = mutable_halves(dq), p.dq_strides = packed_strides(dq);
  p.dk = mutable_halves(dk), p.dk_strides = packed_strides(dk);
  p.dv = mutable_halves(dv), p.dv_strides = packed_strides(dv);
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.dlse = data_or_null<float>(dlse);
  if (dlse) p.dlse_strides = {0, dlse->stride(0), dlse->stride(1)};
  params.bounds_q = sequence_bounds(bounds_q, p.shape.T);
  params.bounds_k = sequence_bounds(bounds_k, p.shape.S);
  params.sequences = static_cast<int>(sequences);
  params.aligned_at_end = aligned_at_end;

  const auto device_index = given_q.get_device_index();
  const bool bf16 = is_bf16(given_q);
  const auto hopper =
      bf16 ? attention_varlen_backward_sm90_bf16 : attention_varlen_backward_sm90_fp16;
  STD_TORCH_CHECK(hopper != nullptr && is_hopper(device_index),
                  "attention_varlen has kernels for Hopper (sm_90a) alone");
  const DeviceScope scope(device_index);
  const HopperBackwardSizes sizes = varlen_backward_sizes(params);
  const Tensor numbers = empty_vector(given_q, sizes.numbers, ScalarType::Float);
  const Tensor dq_sums = empty_vector(given_q, sizes.dq_sums, ScalarType::Float);
  const HopperBackwardRoom room{static_cast<float*>(numbers.mutable_data_ptr()),
                                static_cast<float*>(dq_sums.mutable_data_ptr()), 0};
  raise_if_failed(hopper(params, room, current_stream(device_index)));
  return {dq, dk, dv};
}

}  // namespace fused_lm
