// What the torch sides of linear layers share: checks, and the launches of their products.
#pragma once

#include <string>

#include "common/device.h"
#include "kernels/activation_bwd.h"
#include "kernels/gemm_tuning_sm90.h"
#include "matrices.h"
#include "shared_memory.h"

namespace fused_lm {

inline Activation activation_of(const std::string& name) {
  struct Named {
    const char* name;
    Activation activation;
  };
  constexpr Named kNamed[] = {
      {"none", Activation::kNone}, {"relu", Activation::kRelu},
      {"silu", Activation::kSilu}, {"relu_squared", Activation::kReluSquared},
      {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh},
  };
  for (const Named& known : kNamed) {
    if (name == known.name) return known.activation;
  }
  STD_TORCH_CHECK(false, "the CUDA kernels have no activation ", name);
}

// The weight [F, C], whichever way it is kept.
inline Tensor weight_rows(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dims");
  return transposed ? turned(weight) : weight;
}

inline void check_sizes(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.size(1) == x.size(1), "x must be [N, C], weight [F, C]");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the tensor core kernels take bfloat16 and float16, got ",
                  torch::headeronly::toString(dtype));
  check_device(weight, x, "weight");
  check_dtype(weight, dtype, "weight");
  check_vector(bias, weight.size(0), x, "bias");
  if (bias) check_dtype(*bias, dtype, "bias");
  for (const int64_t size : {x.size(1), weight.size(0)}) {
    STD_TORCH_CHECK(size >= kGemmStep && size % kGemmStep == 0 && size <= INT32_MAX,
                    "C and F must be multiples of ", kGemmStep, " below 2^31, got ", size);
  }
  STD_TORCH_CHECK(x.size(0) <= INT32_MAX, "x must have fewer than 2^31 rows");
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
