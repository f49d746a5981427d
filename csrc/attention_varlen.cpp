// Attention inside each of several packed sequences: checks, allocation, launch. What
// fused_lm/reference/attention_varlen.py computes one sequence after the other.
#include "kernels/attention_varlen.h"

#include <array>
#include <cmath>

#include "attention_varlen_ops.h"
#include "common/device.h"
#include "packed.h"
#include "shared_memory.h"

namespace fused_lm {
std::tuple<Tensor, Tensor> attention_varlen_fwd(const Tensor& given_q, const Tensor& given_k,
                                                const Tensor& given_v, const Tensor& given_bounds_q,
                                                const Tensor& given_bounds_k,
                                                std::optional<int64_t> lower,
                                                std::optional<int64_t> upper, bool aligned_at_end,
                                                double scale, double softcap) {
  check_packed(given_q, given_k, given_v);
  const int64_t sequences = check_bounds(given_bounds_q, given_bounds_k, given_q);
  const int64_t N = given_q.size(0), H = given_q.size(1), Dv = given_v.size(2);
  const std::array<int64_t, 3> out_size{N, H, Dv};
  const std::array<int64_t, 2> lse_size{H, N};
  Tensor out = torch::stable::new_empty(given_q, {out_size.data(), 3});
  Tensor lse = torch::stable::new_empty(given_q, {lse_size.data(), 2}, ScalarType::Float);
  if (N * H == 0) return {out, lse};
  if (given_k.size(0) == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  const Tensor q = mapped(given_q), k = mapped(given_k), v = mapped(given_v);
  const Tensor bounds_q = torch::stable::contiguous(given_bounds_q);
  const Tensor bounds_k = torch::stable::contiguous(given_bounds_k);
  AttentionVarlenParams params{};
  params.q = halves(q);
  params.k = halves(k);
  params.v = halves(v);
  params.out = mutable_halves(out);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.bounds_q = sequence_bounds(bounds_q, N);
  params.bounds_k = sequence_bounds(bounds_k, given_k.size(0));
  params.q_strides = packed_strides(q);
  params.k_strides = packed_strides(k);
  params.v_strides = packed_strides(v);
  params.out_strides = packed_strides(out);
  params.sequences = static_cast<int>(sequences);
  params.H = static_cast<int>(H);
  params.group = static_cast<int>(H / given_k.size(1));
  params.D = static_cast<int>(given_q.size(2));
  params.Dv = static_cast<int>(Dv);
  params.lower = varlen_bound(lower, -kMaxVarlenRows);
  params.upper = varlen_bound(upper, kMaxVarlenRows);
  params.aligned_at_end = aligned_at_end;
  params.scale = static_cast<float>(scale);
  params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  params.softcap = static_cast<float>(softcap);

  const auto device_index = given_q.get_device_index();
  const DeviceScope scope(device_index);
  const auto hopper = is_bf16(given_q) ? attention_varlen_sm90_bf16 : attention_varlen_sm90_fp16;
  STD_TORCH_CHECK(hopper != nullptr && is_hopper(device_index),
                  "attention_varlen has kernels for Hopper (sm_90a) alone");
  // From which the blocks of the persistent grid take their tiles.
  const Tensor counter = empty_vector(given_q, 1, ScalarType::Int);
  raise_if_failed(hopper(params, multiprocessors(device_index),
                         static_cast<int*>(counter.mutable_data_ptr()),
                         current_stream(device_index)));
  return {out, lse};
}

}  // namespace fused_lm
