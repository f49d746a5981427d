// Softmax attention: checks, allocation, launch. What fused_lm/triton_kernels/attention.py is for
// the Triton kernels.
#include "kernels/attention.h"

#include <array>

#include "attention_ops.h"
#include "attention_params.h"
#include "common/device.h"
#include "shared_memory.h"

namespace fused_lm {
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& given_q, const Tensor& given_k,
                                         const Tensor& given_v, const OptionalTensor& mask,
                                         const OptionalTensor& key_mask, const OptionalTensor& bias,
                                         const OptionalTensor& given_rng,
                                         std::optional<int64_t> lower, std::optional<int64_t> upper,
                                         double scale, double softcap, double dropout_p) {
  check_values(given_v, given_k);
  AttentionForwardParams params{};
  params.shape = shape_of(given_q, given_k, given_v.size(3));
  const AttentionShape& shape = params.shape;
  check_rng(given_rng, given_q);
  params.score = score_params(shape, given_q, mask, key_mask, bias, lower, upper, scale, softcap);

  const Tensor out = empty_heads(given_q, shape.Dv);
  const Tensor lse = empty_like_heads(given_q, ScalarType::Float);
  if (int64_t{shape.B} * shape.H * shape.T == 0) return {out, lse};
  const Tensor q = aligned_heads(given_q);
  const Tensor k = aligned_heads(given_k);
  const Tensor v = aligned_heads(given_v);
  const OptionalTensor rng = contiguous(given_rng);
  params.q = halves(q);
  params.k = halves(k);
  params.v = halves(v);
  params.out = mutable_halves(out);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.q_strides = head_strides(q);
  params.k_strides = head_strides(k);
  params.v_strides = head_strides(v);
  params.out_strides = head_strides(out);
  params.dropout = dropout_params(rng, dropout_p);

  const auto device_index = given_q.get_device_index();
  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  const auto hopper = is_bf16(given_q) ? attention_forward_sm90_bf16 : attention_forward_sm90_fp16;
  if (hopper != nullptr && is_hopper(device_index) && attention_forward_sm90_takes(params)) {
    // From which the blocks of the persistent grid take their tiles.
    const std::array<int64_t, 1> size{1};
    const Tensor counter = torch::stable::new_empty(given_q, {size.data(), 1}, ScalarType::Int);
    raise_if_failed(hopper(params, multiprocessors(device_index),
                           static_cast<int*>(counter.mutable_data_ptr()), stream));
    return {out, lse};
  }
  const size_t shared_bytes = shared_bytes_per_block(device_index);
  raise_if_failed(is_bf16(given_q) ? attention_forward_bf16(params, shared_bytes, stream)
                                   : attention_forward_fp16(params, shared_bytes, stream));
  return {out, lse};
}

Tensor attention_weights_fwd(const Tensor& given_q, const Tensor& given_k, const Tensor& given_lse,
                             const OptionalTensor& mask, const OptionalTensor& key_mask,
                             const OptionalTensor& bias, const OptionalTensor& given_rng,
                             std::optional<int64_t> lower, std::optional<int64_t> upper,
                             double scale, double softcap, double dropout_p, bool average_heads) {
  AttentionWeightsParams params{};
  params.shape = shape_of(given_q, given_k, given_q.size(3));
  const AttentionShape& shape = params.shape;
  check_row_values(given_lse, given_q, "lse");
  check_rng(given_rng, given_q);
  params.score = score_params(shape, given_q, mask, key_mask, bias, lower, upper, scale, softcap);

  const std::array<int64_t, 4> size{shape.B, shape.H, shape.T, shape.S};
  const std::array<int64_t, 3> mean_size{shape.B, shape.T, shape.S};
  Tensor weights = average_heads ? torch::stable::new_empty(given_q, {mean_size.data(), 3})
                                 : torch::stable::new_empty(given_q, {size.data(), 4});
  if (weights.numel() == 0) return weights;
  if (shape.H == 0) return torch::stable::zero_(weights);
  const Tensor q = aligned_heads(given_q);
  const Tensor k = aligned_heads(given_k);
  const Tensor lse = torch::stable::contiguous(given_lse);
  const OptionalTensor rng = contiguous(given_rng);
  params.q = halves(q);
  params.k = halves(k);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.weights = mutable_halves(weights);
  params.q_strides = head_strides(q);
  params.k_strides = head_strides(k);
  params.dropout = dropout_params(rng, dropout_p);
  params.average_heads = average_heads;

  const auto device_index = given_q.get_device_index();
  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  raise_if_failed(is_bf16(given_q) ? attention_weights_bf16(params, stream)
                                   : attention_weights_fp16(params, stream));
  return weights;
}

}  // namespace fused_lm
