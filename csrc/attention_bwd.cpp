// The backward of softmax attention: checks, allocation, launches.
#include "attention_ops.h"
#include "attention_params.h"
#include "common/device.h"
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

Status backward(const AttentionBackwardParams& params, bool bf16, size_t shared_bytes,
                Stream stream) {
  const Status delta =
      bf16 ? attention_delta_bf16(params, stream) : attention_delta_fp16(params, stream);
  if (delta != kOk) return delta;
  const Status dkdv = bf16 ? attention_dkdv_bf16(params, shared_bytes, stream)
                           : attention_dkdv_fp16(params, shared_bytes, stream);
  if (dkdv != kOk) return dkdv;
  return bf16 ? attention_dq_bf16(params, shared_bytes, stream)
              : attention_dq_fp16(params, shared_bytes, stream);
}

// What the backward's parameters say to the kernel of the bias gradient.
AttentionDbiasParams dbias_params(const AttentionBackwardParams& params, const Tensor& bias,
                                  const Tensor& dbias) {
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
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& given_dout, const OptionalTensor& dlse, const Tensor& given_q,
    const Tensor& given_k, const Tensor& given_v, const Tensor& given_out, const Tensor& given_lse,
    const OptionalTensor& mask, const OptionalTensor& key_mask, const OptionalTensor& bias,
    const OptionalTensor& given_rng, std::optional<int64_t> lower, std::optional<int64_t> upper,
    double scale, double softcap, double dropout_p, bool needs_dbias) {
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

  Tensor dq = empty_heads(given_q, shape.D);
  Tensor dk = empty_heads(given_k, shape.D);
  Tensor dv = empty_heads(given_v, shape.Dv);
  Tensor dbias = needs_dbias && bias ? torch::stable::new_empty(*bias, bias->sizes())
                                     : empty_vector(given_q, 0, given_q.scalar_type());
  if (int64_t{shape.B} * shape.H * shape.T * shape.S == 0) {
    return {torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv),
            torch::stable::zero_(dbias)};
  }
  const Tensor q = aligned_heads(given_q), k = aligned_heads(given_k), v = aligned_heads(given_v);
  const Tensor out = aligned_heads(given_out), dout = aligned_heads(given_dout);
  const Tensor lse = torch::stable::contiguous(given_lse);
  const OptionalTensor rng = contiguous(given_rng);
  const Tensor row_lse = empty_like_heads(given_q, ScalarType::Float);
  const Tensor delta = empty_like_heads(given_q, ScalarType::Float);
  params.q = halves(q), params.q_strides = head_strides(q);
  params.k = halves(k), params.k_strides = head_strides(k);
  params.v = halves(v), params.v_strides = head_strides(v);
  params.out = halves(out), params.out_strides = head_strides(out);
  params.dout = halves(dout), params.dout_strides = head_strides(dout);
  params.dq = mutable_halves(dq), params.dq_strides = head_strides(dq);
  params.dk = mutable_halves(dk), params.dk_strides = head_strides(dk);
  params.dv = mutable_halves(dv), params.dv_strides = head_strides(dv);
  params.dlse = data_or_null<float>(dlse);
  if (dlse) params.dlse_strides = head_strides(*dlse);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.row_lse = static_cast<float*>(row_lse.mutable_data_ptr());
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  params.dropout = dropout_params(rng, dropout_p);

  const auto device_index = given_q.get_device_index();
  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  const bool bf16 = is_bf16(given_q);
  raise_if_failed(backward(params, bf16, shared_bytes_per_block(device_index), stream));
  if (needs_dbias && bias) {
    const AttentionDbiasParams p = dbias_params(params, *bias, dbias);
    raise_if_failed(bf16 ? attention_dbias_bf16(p, stream) : attention_dbias_fp16(p, stream));
  }
  return {dq, dk, dv, dbias};
}

}  // namespace fused_lm
