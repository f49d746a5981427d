// Attention to a KV cache: checks, allocation, launch. What fused_lm/reference/attention_decode.py
// computes on a copy of the cache.
#include "kernels/attention_decode.h"

#include <algorithm>
#include <array>

#include "attention_decode_ops.h"
#include "common/device.h"
#include "heads.h"
#include "kernels/attention_decode_tuning.h"

namespace fused_lm {
namespace {

// S, the most keys of a sequence.
int64_t check_cache(const Tensor& q, const Tensor& k, const Tensor& v,
                    const OptionalTensor& table) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attention_decode takes tensors of four dims");
  check_device(k, q, "k_cache");
  check_device(v, q, "v_cache");
  check_dtype(k, q.scalar_type(), "k_cache");
  check_dtype(v, q.scalar_type(), "v_cache");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(v.size(dim) == k.size(dim), "v_cache must have all dims of k_cache but one");
  }
  STD_TORCH_CHECK(k.size(3) == q.size(3), "q and k_cache must share D");
  if (!table) {
    STD_TORCH_CHECK(k.size(0) == q.size(0), "q and k_cache must share B");
    return k.size(2);
  }
  STD_TORCH_CHECK(table->dim() == 2 && table->size(0) == q.size(0) && k.size(2) > 0,
                  "block_table must be [B, blocks] of blocks with a row or more");
  return k.size(2) * table->size(1);
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t S) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), Dv = v.size(3);
  const int64_t heads = k.size(1);
  STD_TORCH_CHECK(heads > 0 && H % heads == 0, "the heads of k_cache must divide the heads of q");
  for (const int64_t dim : {D, Dv}) {
    STD_TORCH_CHECK(dim >= 1 && dim <= kMaxHeadDim && dim % kHeadDimStep == 0,
                    "head dims must be multiples of ", kHeadDimStep, " up to ", kMaxHeadDim,
                    ", got ", dim);
  }
  STD_TORCH_CHECK(S <= kMaxLengths && T <= kMaxLengths && heads <= kMaxHeads && B < INT32_MAX &&
                      H / heads * T + S <= kMaxLengths && k.size(0) < INT32_MAX,
                  "attention_decode takes fewer than 2^31 queries and keys, and ", kMaxHeads,
                  " key heads");
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  return {narrow(B), narrow(H), narrow(H / heads), narrow(T), narrow(S), narrow(D), narrow(Dv)};
}

Integers integers(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t) return {nullptr, false};
  check_device(t, like, name);
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name,
                  " must be int32 or int64, got ", torch::headeronly::toString(dtype));
  return {t->const_data_ptr(), dtype == ScalarType::Long};
}

// Bounds beyond all lengths hide nothing, or everything, as the farthest do.
int clamped(std::optional<int64_t> bound, int64_t absent) {
  return static_cast<int>(std::clamp<int64_t>(bound.value_or(absent), -kMaxLengths, kMaxLengths));
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& given_q, const Tensor& given_k,
                                                const Tensor& given_v, const Tensor& given_lens,
                                                const OptionalTensor& given_table,
                                                std::optional<int64_t> lower,
                                                std::optional<int64_t> upper, double scale,
                                                double softcap) {
  AttentionDecodeParams params{};
  const int64_t S = check_cache(given_q, given_k, given_v, given_table);
  params.shape = shape_of(given_q, given_k, given_v, S);
  const AttentionShape& shape = params.shape;
  check_vector(given_lens, shape.B, given_q, "cache_lens");

  const Tensor out = empty_heads(given_q, shape.Dv);
  const Tensor lse = empty_like_heads(given_q, ScalarType::Float);
  const int64_t rows = int64_t{shape.B} * shape.H * shape.T;
  if (rows == 0) return {out, lse};
  const Tensor q = aligned_heads(given_q);
  const Tensor k = aligned_heads(given_k);
  const Tensor v = aligned_heads(given_v);
  const Tensor lens = torch::stable::contiguous(given_lens);
  const OptionalTensor table = contiguous(given_table);
  params.q = halves(q);
  params.k = halves(k);
  params.v = halves(v);
  params.out = mutable_halves(out);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lens = integers(lens, given_q, "cache_lens");
  params.table = integers(table, given_q, "block_table");
  params.q_strides = head_strides(q);
  params.k_strides = head_strides(k);
  params.v_strides = head_strides(v);
  params.out_strides = head_strides(out);
  params.blocks = static_cast<int>(k.size(0));
  params.block_size = static_cast<int>(k.size(2));
  params.lower = clamped(lower, -kMaxLengths);
  params.upper = clamped(upper, kMaxLengths);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);

  const auto device_index = given_q.get_device_index();
  const DeviceScope scope(device_index);
  params.splits = attention_decode_splits(shape, multiprocessors(device_index));
  OptionalTensor partial, extremes;  // kept until the launches are in the stream
  if (params.splits > 1) {
    partial = empty_rows(lse, params.splits * rows, shape.Dv, ScalarType::Float);
    extremes = empty_rows(lse, params.splits * rows, 2, ScalarType::Float);
    params.partial = mutable_data_or_null<float>(partial);
    params.extremes = mutable_data_or_null<float>(extremes);
  }
  const Stream stream = current_stream(device_index);
  raise_if_failed(is_bf16(given_q) ? attention_decode_bf16(params, stream)
                                   : attention_decode_fp16(params, stream));
  return {out, lse};
}

}  // namespace fused_lm
