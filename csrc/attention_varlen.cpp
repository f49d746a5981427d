// Attention inside each of several packed sequences: checks, allocation, launch. What
// fused_lm/reference/attention_varlen.py computes one sequence after the other.
#include "kernels/attention_varlen.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "attention_varlen_ops.h"
#include "common/device.h"
#include "heads.h"
#include "shared_memory.h"

namespace fused_lm {
namespace {

void check_packed(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "attention_varlen takes tensors of three dims");
  check_device(k, q, "k");
  check_device(v, q, "v");
  check_dtype(k, q.scalar_type(), "k");
  check_dtype(v, q.scalar_type(), "v");
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1),
                  "v must have the rows and the heads of k");
  STD_TORCH_CHECK(k.size(2) == q.size(2), "q and k must share D");
  const int64_t H = q.size(1), heads = k.size(1);
  STD_TORCH_CHECK(heads > 0 && H % heads == 0 && H <= kMaxHeads,
                  "the heads of k must divide the heads of q, ", kMaxHeads, " at most");
  for (const int64_t dim : {q.size(2), v.size(2)}) {
    STD_TORCH_CHECK(dim >= 1 && dim <= kMaxHeadDim && dim % kHeadDimStep == 0,
                    "head dims must be multiples of ", kHeadDimStep, " up to ", kMaxHeadDim,
                    ", got ", dim);
  }
  STD_TORCH_CHECK(q.size(0) <= kMaxVarlenRows && k.size(0) <= kMaxVarlenRows,
                  "attention_varlen takes fewer than 2^29 rows");
}

// How many sequences both name.
int64_t check_bounds(const Tensor& bounds_q, const Tensor& bounds_k, const Tensor& q) {
  for (const Tensor& bounds : {bounds_q, bounds_k}) {
    check_device(bounds, q, "cu_seqlens");
    const ScalarType dtype = bounds.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                    "cu_seqlens must be int32 or int64, got ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(bounds.dim() == 1 && bounds.size(0) == bounds_q.size(0) && bounds.size(0) > 0,
                    "cu_seqlens must be [sequences + 1], of as many for q as for k");
  }
  const int64_t sequences = bounds_q.size(0) - 1;
  STD_TORCH_CHECK(sequences > 0 || q.size(0) == 0, "queries must be of a sequence");
  constexpr int64_t kMostTiles = INT32_MAX / 2;
  const int64_t tiles = varlen_tiles(q.size(0), sequences, kSmallestVarlenTile);
  STD_TORCH_CHECK(tiles <= kMostTiles / std::max<int64_t>(q.size(1), 1),
                  "attention_varlen takes up to 2^30 tiles of 128 queries, a sequence and a head");
  return sequences;
}

// Of a dim of one element the tensor's own stride says nothing.
HeadStrides packed_strides(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? int64_t{0} : t.stride(dim); };
  return {0, stride(1), stride(0)};
}

// The tensor, or one copy where a tensor map can't describe it.
Tensor mapped(const Tensor& t) {
  const auto fits = [](const Tensor& rows) {
    const HeadStrides strides = packed_strides(rows);
    return rows.stride(2) == 1 && strides.head % kHeadDimStep == 0 &&
           strides.row % kHeadDimStep == 0 &&
           reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
           maps_heads(strides, 1, static_cast<int>(rows.size(1)), static_cast<int>(rows.size(0)));
  };
  if (fits(t)) return t;
  const Tensor packed = torch::stable::contiguous(t);
  return fits(packed) ? packed : torch::stable::clone(packed);
}

SequenceBounds sequence_bounds(const Tensor& bounds, int64_t rows) {
  return {bounds.const_data_ptr(), bounds.scalar_type() == ScalarType::Long,
          static_cast<int>(rows)};
}

int clamped(std::optional<int64_t> bound, int absent) {
  return static_cast<int>(std::clamp<int64_t>(bound.value_or(absent), -int64_t{kMaxVarlenRows},
                                              int64_t{kMaxVarlenRows}));
}

}  // namespace

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
  params.lower = clamped(lower, -kMaxVarlenRows);
  params.upper = clamped(upper, kMaxVarlenRows);
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
