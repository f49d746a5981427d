// The backward of softmax attention on Hopper: checks, allocation, launches. It stands beside
// attention_bwd.cpp, whose code is part of what the forward's hardware record speaks for.
#include "attention_bwd_sm90_ops.h"

#include <algorithm>

#include "attention_params.h"
#include "common/device.h"
#include "kernels/attention_bwd_hopper.h"
#include "shared_memory.h"

namespace fused_lm {
namespace {

void check_like_out(const Tensor& t, const Tensor& q, int64_t Dv, const char* name) {
  check_device(t, q, name);
  check_dtype(t, q.scalar_type(), name);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) &&
                      t.size(2) == q.size(2) && t.size(3) == Dv,
                  name, " must be [B, H, T, Dv]");
}

// Of the sums of dq; 0 if blocks add in any order, or where the two passes are for those who won't.
int chosen_slots(int64_t given, const AttentionShape& shape, int device_index) {
  STD_TORCH_CHECK(given >= kSlotsByTuning && given <= INT32_MAX,
                  "dq_slots must be a number of slots, 0 or ", kSlotsByTuning, ", got ", given);
  if (given != kSlotsByTuning) return static_cast<int>(given);
  return hopper_backward_slots(hopper_backward_work(shape), multiprocessors(device_index));
}

// dq, dk and dv.
void one_pass(const AttentionBackwardParams& params, const Tensor& q, int slots, Stream stream) {
  const HopperBackwardSizes sizes = hopper_backward_sizes(params.shape);
  const Tensor numbers = empty_vector(q, sizes.numbers, ScalarType::Float);
  const Tensor dq_sums = empty_vector(q, std::max(slots, 1) * sizes.dq_sums, ScalarType::Float);
  const HopperBackwardRoom room{static_cast<float*>(numbers.mutable_data_ptr()),
                                static_cast<float*>(dq_sums.mutable_data_ptr()), slots};
  raise_if_failed(is_bf16(q) ? attention_backward_sm90_bf16(params, room, stream)
                             : attention_backward_sm90_fp16(params, room, stream));
}

// The bias gradient has a pass of its own, from delta as attention_bwd_delta makes it.
void bias_gradient(AttentionBackwardParams& params, const Tensor& q, const Tensor& bias,
                   const Tensor& dbias, Stream stream) {
  const Tensor row_lse = empty_like_heads(q, ScalarType::Float);
  const Tensor delta = empty_like_heads(q, ScalarType::Float);
  params.row_lse = static_cast<float*>(row_lse.mutable_data_ptr());
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  AttentionDbiasParams p{};
  p.shape = params.shape;
  p.score = params.score;
  p.dropout = params.dropout;
  p.sizes = {static_cast<int>(bias.size(0)), static_cast<int>(bias.size(1)),
             static_cast<int>(bias.size(2)), static_cast<int>(bias.size(3))};
  p.q = params.q, p.q_strides = params.q_strides;
  p.k = params.k, p.k_strides = params.k_strides;
  p.v = params.v, p.v_strides = params.v_strides;
  p.dout = params.dout, p.dout_strides = params.dout_strides;
  p.lse = params.lse;
  p.delta = params.delta;
  p.dbias = dbias.mutable_data_ptr();
  const bool bf16 = is_bf16(q);
  raise_if_failed(bf16 ? attention_delta_bf16(params, stream)
                       : attention_delta_fp16(params, stream));
  raise_if_failed(bf16 ? attention_dbias_bf16(p, stream) : attention_dbias_fp16(p, stream));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_sm90(
    const Tensor& given_dout, const OptionalTensor& dlse, const Tensor& given_q,
    const Tensor& given_k, const Tensor& given_v, const Tensor& given_out, const Tensor& given_lse,
    const OptionalTensor& mask, const OptionalTensor& key_mask, const OptionalTensor& bias,
    const OptionalTensor& given_rng, std::optional<int64_t> lower, std::optional<int64_t> upper,
    double scale, double softcap, double dropout_p, bool needs_dbias, int64_t given_slots) {
  const auto for_every_gpu = [&] {
    return attention_bwd(given_dout, dlse, given_q, given_k, given_v, given_out, given_lse, mask,
                         key_mask, bias, given_rng, lower, upper, scale, softcap, dropout_p,
                         needs_dbias);
  };
  const auto device_index = given_q.get_device_index();
  if (attention_backward_sm90_bf16 == nullptr || !is_hopper(device_index)) return for_every_gpu();
  check_values(given_v, given_k);
  AttentionBackwardParams params{};
  params.shape = shape_of(given_q, given_k, given_v.size(3));
  const AttentionShape& shape = params.shape;
  check_like_out(given_out, given_q, shape.Dv, "out");
  check_like_out(given_dout, given_q, shape.Dv, "dout");
  check_row_values(given_lse, given_q, "lse");
  if (dlse) check_row_values(*dlse, given_q, "dlse");
  check_rng(given_rng, given_q);
  params.score = score_params(shape, given_q, mask, key_mask, bias, lower, upper, scale, softcap);

  const Tensor dq = empty_heads(given_q, shape.D);
  const Tensor dk = empty_heads(given_k, shape.D);
  const Tensor dv = empty_heads(given_v, shape.Dv);
  const Tensor q = aligned_heads(given_q), k = aligned_heads(given_k), v = aligned_heads(given_v);
  const Tensor out = aligned_heads(given_out), dout = aligned_heads(given_dout);
  params.q_strides = head_strides(q), params.dq_strides = head_strides(dq);
  params.k_strides = head_strides(k), params.dk_strides = head_strides(dk);
  params.v_strides = head_strides(v), params.dv_strides = head_strides(dv);
  params.out_strides = head_strides(out), params.dout_strides = head_strides(dout);
  if (!attention_backward_sm90_takes(params)) return for_every_gpu();
  const int slots = chosen_slots(given_slots, shape, device_index);
  if (slots == 0 && given_slots != 0) return for_every_gpu();
  const Tensor lse = torch::stable::contiguous(given_lse);
  const OptionalTensor rng = contiguous(given_rng);
  params.q = halves(q), params.dq = mutable_halves(dq);
  params.k = halves(k), params.dk = mutable_halves(dk);
  params.v = halves(v), params.dv = mutable_halves(dv);
  params.out = halves(out), params.dout = halves(dout);
  params.dlse = data_or_null<float>(dlse);
  if (dlse) params.dlse_strides = head_strides(*dlse);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.dropout = dropout_params(rng, dropout_p);

  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  one_pass(params, given_q, slots, stream);
  const bool makes_dbias = needs_dbias && bias;
  const Tensor dbias = makes_dbias ? torch::stable::new_empty(*bias, bias->sizes())
                                   : empty_vector(given_q, 0, given_q.scalar_type());
  if (makes_dbias) bias_gradient(params, given_q, *bias, dbias, stream);
  return {dq, dk, dv, dbias};
}

}  // namespace fused_lm
