// What the torch sides of linear layers share: checks, and the launches of their products.
#pragma once

#include <string>

#include "common/device.h"
#include "kernels/activation_bwd.h"
#include "kernels/gemm_tuning_sm90.h"
#include "matrices.h"
#include "shared_memory.h"

namespace fused_lm {

// Gated: act(gate) value, of pre-activations that are twice as wide, gates first.
struct LayerActivation {
  const char* name;
  Activation activation;
  bool gated;

  int64_t parts() const { return gated ? 2 : 1; }
};

inline LayerActivation activation_of(const std::string& name) {
  constexpr LayerActivation kKnown[] = {
      {"none", Activation::kNone, false},
      {"relu", Activation::kRelu, false},
      {"relu_squared", Activation::kReluSquared, false},
      {"silu", Activation::kSilu, false},
      {"gelu", Activation::kGelu, false},
      {"gelu_tanh", Activation::kGeluTanh, false},
      {"swiglu", Activation::kSilu, true},
      {"geglu", Activation::kGelu, true},
      {"geglu_tanh", Activation::kGeluTanh, true},
  };
  for (const LayerActivation& known : kKnown) {
    if (name == known.name) return known;
  }
  STD_TORCH_CHECK(false, "the CUDA kernels have no activation ", name);
}

// The weight [F, C], whichever way it is kept.
inline Tensor weight_rows(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dims");
  return transposed ? turned(weight) : weight;
}

// weight: [F, C], or where parts are two [2 F, C].
inline void check_sizes(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        int64_t parts = 1) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.size(1) == x.size(1), "x must be [N, C], weight [F, C]");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the tensor core kernels take bfloat16 and float16, got ",
                  torch::headeronly::toString(dtype));
  check_device(weight, x, "weight");
  check_dtype(weight, dtype, "weight");
  check_vector(bias, weight.size(0), x, "bias");
  if (bias) check_dtype(*bias, dtype, "bias");
  const int64_t C = x.size(1), outputs = weight.size(0);
  const bool fits = C <= INT32_MAX && outputs <= INT32_MAX;
  STD_TORCH_CHECK(
      C > 0 && outputs > 0 && fits && C % kGemmStep == 0 && outputs % (parts * kGemmStep) == 0,
      "C and F must be multiples of ", kGemmStep, " below 2^31, got ", C, " and ", outputs,
      parts == 1 ? "" : " for gates and values");
  STD_TORCH_CHECK(x.size(0) <= INT32_MAX, "x must have fewer than 2^31 rows");
}

// Of N rows like dy, `width` columns.
inline void check_pre(const Tensor& pre, const Tensor& dy, int64_t width) {
  STD_TORCH_CHECK(pre.dim() == 2 && pre.size(0) == dy.size(0) && pre.size(1) == width,
                  "pre must be [N, F], of a gated layer [N, 2 F]");
  check_device(pre, dy, "pre");
  check_dtype(pre, dy.scalar_type(), "pre");
}

inline uint16_t* mutable_rows(const Tensor& t) {
  return static_cast<uint16_t*>(t.mutable_data_ptr());
}

inline void run_gemm(const GemmParams& params, const Tensor& like) {
  const auto device_index = like.get_device_index();
  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  const bool bf16 = like.scalar_type() == ScalarType::BFloat16;
  if (gemm_sm90_bf16 == nullptr || !is_hopper(device_index)) {
    raise_if_failed(bf16 ? gemm_sm80_bf16(params, stream) : gemm_sm80_fp16(params, stream));
    return;
  }
  GemmParams placed = params;
  placed.sms = multiprocessors(device_index);
  const Tensor parts = empty_vector(like, gemm_part_floats(placed), ScalarType::Float);
  placed.parts = static_cast<float*>(parts.mutable_data_ptr());
  raise_if_failed(bf16 ? gemm_sm90_bf16(placed, stream) : gemm_sm90_fp16(placed, stream));
}

// out [N] = the sums of the strips' sums [strips, N].
inline void add_strips(const Tensor& out, const Tensor& partial) {
  const auto device_index = out.get_device_index();
  const DeviceScope scope(device_index);
  const ColumnSumsParams sums{static_cast<int>(partial.size(0)), static_cast<int>(partial.size(1)),
                              static_cast<const float*>(partial.const_data_ptr()),
                              mutable_rows(out)};
  raise_if_failed(column_sums(sums, kernel_dtype(out, "dbias"), current_stream(device_index)));
}

}  // namespace fused_lm
