// Linear layers with their activation on Hopper: checks, allocation, launches. What
// fused_lm/triton_kernels/linear_act.py is for the Triton kernels.
#include "linear_act_ops.h"

#include "common/device.h"
#include "kernels/gemm.h"
#include "matrices.h"
#include "shared_memory.h"

namespace fused_lm {
namespace {

Activation activation_of(const std::string& name) {
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
Tensor weight_rows(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dims");
  return transposed ? turned(weight) : weight;
}

void check_sizes(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
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

void run_gemm(const GemmParams& params, const Tensor& like) {
  const auto device_index = like.get_device_index();
  STD_TORCH_CHECK(gemm_bf16 != nullptr && is_hopper(device_index),
                  "the CUDA kernels of linear layers are built for Hopper (sm_90a) alone");
  const DeviceScope scope(device_index);
  GemmParams placed = params;
  placed.sms = multiprocessors(device_index);
  const bool bf16 = like.scalar_type() == ScalarType::BFloat16;
  const Stream stream = current_stream(device_index);
  raise_if_failed(bf16 ? gemm_bf16(placed, stream) : gemm_fp16(placed, stream));
}

// What kernels read in pairs.
OptionalTensor paired(const OptionalTensor& vector) {
  if (!vector) return std::nullopt;
  const Tensor packed = torch::stable::contiguous(*vector);
  const bool aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 4 == 0;
  return aligned ? packed : torch::stable::clone(packed);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_act_fwd(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const OptionalTensor&,
                                          const std::string& activation, bool transposed,
                                          bool keep_pre) {
  const Tensor rows = weight_rows(weight, transposed);
  check_sizes(x, rows, bias);
  const int64_t N = x.size(0), F = rows.size(0);
  const Tensor y = empty_rows(x, N, F, x.scalar_type());
  const Tensor pre = keep_pre ? empty_rows(x, N, F, x.scalar_type())
                              : empty_vector(x, 0, x.scalar_type());
  if (N == 0) return {y, pre};
  const Matrix a = matrix_of(x, false), b = matrix_of(rows, true);
  const OptionalTensor added = paired(bias);
  GemmParams params{};
  params.M = static_cast<int>(N);
  params.N = static_cast<int>(F);
  params.K = static_cast<int>(x.size(1));
  params.a = a.operand;
  params.b = b.operand;
  params.bias = data_or_null<uint16_t>(added);
  params.activation = activation_of(activation);
  params.pre = keep_pre ? static_cast<uint16_t*>(pre.mutable_data_ptr()) : nullptr;
  params.out = static_cast<uint16_t*>(y.mutable_data_ptr());
  run_gemm(params, x);
  return {y, pre};
}

}  // namespace fused_lm
