// LayerNorm and RMSNorm: checks, allocation, launch. What fused_lm/triton_kernels/layernorm.py is
// for the Triton kernels.
#include "layernorm_ops.h"

#include "common/device.h"
#include "kernels/layernorm.h"
#include "tensors.h"

namespace fused_lm {
namespace {

struct ForwardOutputs {
  Tensor y;
  Tensor stream;
  Tensor rstd;
};

struct BackwardOutputs {
  Tensor dx;
  Tensor dresidual;
  Tensor dweight;
  Tensor dbias;
};

// Fills mean; an RMSNorm where there is none.
ForwardOutputs forward(const Tensor& given_x, const OptionalTensor& given_residual,
                       const OptionalTensor& given_weight, const OptionalTensor& given_bias,
                       const OptionalTensor& given_rng, const OptionalTensor& mean, double eps,
                       double dropout_p, ScalarType out_dtype, ScalarType residual_dtype) {
  const int64_t N = given_x.size(0);
  const int64_t C = given_x.size(1);
  check_rows(given_residual, given_x, "residual");
  check_vector(given_weight, C, given_x, "weight");
  check_vector(given_bias, C, given_x, "bias");
  check_rng(given_rng, given_x);
  const bool has_stream = given_residual || given_rng;

  NormForwardParams params{};
  params.x_dtype = kernel_dtype(given_x, "x");
  params.residual_dtype = kernel_dtype(given_residual, "residual");
  params.weight_dtype = kernel_dtype(given_weight, "weight");
  params.bias_dtype = kernel_dtype(given_bias, "bias");
  params.y_dtype = kernel_dtype(out_dtype, "y");
  params.stream_dtype = kernel_dtype(residual_dtype, "the stream");

  ForwardOutputs out{empty_rows(given_x, N, C, out_dtype),
                     has_stream ? empty_rows(given_x, N, C, residual_dtype)
                                : empty_vector(given_x, 0, residual_dtype),
                     empty_vector(given_x, N, ScalarType::Float)};
  if (N == 0) return out;
  const Tensor x = rows_contiguous(given_x);
  const OptionalTensor residual = rows_contiguous(given_residual);
  const OptionalTensor weight = contiguous(given_weight);
  const OptionalTensor bias = contiguous(given_bias);
  const OptionalTensor rng = contiguous(given_rng);
  params.x = x.const_data_ptr();
  params.residual = data_or_null(residual);
  params.weight = data_or_null(weight);
  params.bias = data_or_null(bias);
  params.y = out.y.mutable_data_ptr();
  params.stream = has_stream ? out.stream.mutable_data_ptr() : nullptr;
  params.mean = mutable_data_or_null<float>(mean);
  params.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  params.N = N;
  params.C = C;
  params.x_stride = row_stride(x);
  params.residual_stride = row_stride(residual);
  params.eps = static_cast<float>(eps);
  params.dropout = dropout_params(rng, dropout_p);

  const auto device_index = given_x.get_device_index();
  const DeviceScope scope(device_index);
  raise_if_failed(norm_forward(params, current_stream(device_index)));
  return out;
}

Tensor gradient_of(const OptionalTensor& parameter, const Tensor& like, bool zeros) {
  if (!parameter) return empty_vector(like, 0, like.scalar_type());
  const int64_t size = parameter->size(0);
  if (!zeros) return empty_vector(*parameter, size, parameter->scalar_type());
  return torch::stable::new_zeros(*parameter, {&size, 1}, parameter->scalar_type());
}

// Partial sums [strips, C] of a parameter's gradient, kept until the launches are in the stream.
OptionalTensor partial_of(const OptionalTensor& parameter, const Tensor& like, int64_t strips,
                          int64_t C) {
  if (!parameter) return std::nullopt;
  return empty_rows(like, strips, C, ScalarType::Float);
}

void check_backward(const Tensor& dy, const OptionalTensor& dstream, const Tensor& stream,
                    const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& rng) {
  STD_TORCH_CHECK(stream.dim() == 2 && stream.size(1) >= 1, "stream must be [N, C] with C >= 1");
  check_rows(dy, stream, "dy");
  check_rows(dstream, stream, "dstream");
  check_vector(weight, stream.size(1), stream, "weight");
  check_vector(bias, stream.size(1), stream, "bias");
  check_vector(mean, stream.size(0), stream, "mean");
  check_vector(rstd, stream.size(0), stream, "rstd");
  check_dtype(rstd, ScalarType::Float, "rstd");
  if (mean) check_dtype(*mean, ScalarType::Float, "mean");
  check_rng(rng, stream);
}

void set_dtypes(NormBackwardParams& params, const Tensor& dy, const OptionalTensor& dstream,
                const Tensor& stream, const OptionalTensor& weight, const OptionalTensor& bias,
                ScalarType x_dtype, ScalarType residual_dtype) {
  params.dy_dtype = kernel_dtype(dy, "dy");
  params.dstream_dtype = kernel_dtype(dstream, "dstream");
  params.stream_dtype = kernel_dtype(stream, "stream");
  params.weight_dtype = kernel_dtype(weight, "weight");
  params.dx_dtype = kernel_dtype(x_dtype, "x");
  params.dresidual_dtype = kernel_dtype(residual_dtype, "residual");
  params.dweight_dtype = params.weight_dtype;
  params.dbias_dtype = kernel_dtype(bias, "bias");
}

// An RMSNorm where there is no mean.
BackwardOutputs backward(const Tensor& given_dy, const OptionalTensor& given_dstream,
                         const Tensor& given_stream, const OptionalTensor& given_weight,
                         const OptionalTensor& bias, const OptionalTensor& given_mean,
                         const Tensor& given_rstd, const OptionalTensor& given_rng,
                         double dropout_p, ScalarType x_dtype,
                         std::optional<ScalarType> residual_dtype) {
  check_backward(given_dy, given_dstream, given_stream, given_weight, bias, given_mean, given_rstd,
                 given_rng);
  const int64_t N = given_stream.size(0);
  const int64_t C = given_stream.size(1);
  const bool separate = residual_dtype && (given_rng || *residual_dtype != x_dtype);
  const ScalarType dresidual_dtype = residual_dtype.value_or(x_dtype);
  NormBackwardParams params{};
  set_dtypes(params, given_dy, given_dstream, given_stream, given_weight, bias, x_dtype,
             dresidual_dtype);

  const Tensor dx = empty_rows(given_stream, N, C, x_dtype);
  BackwardOutputs out{dx,
                      separate ? empty_rows(given_stream, N, C, dresidual_dtype)
                               : empty_vector(given_stream, 0, dresidual_dtype),
                      gradient_of(given_weight, given_dy, N == 0),
                      gradient_of(bias, given_dy, N == 0)};
  if (N == 0) return out;
  const Tensor dy = rows_contiguous(given_dy);
  const OptionalTensor dstream = rows_contiguous(given_dstream);
  const Tensor stream = rows_contiguous(given_stream);
  const OptionalTensor weight = contiguous(given_weight);
  const OptionalTensor mean = contiguous(given_mean);
  const Tensor rstd = torch::stable::contiguous(given_rstd);
  const OptionalTensor rng = contiguous(given_rng);
  params.dy = dy.const_data_ptr();
  params.dstream = data_or_null(dstream);
  params.stream = stream.const_data_ptr();
  params.weight = data_or_null(weight);
  params.mean = data_or_null<float>(mean);
  params.rstd = static_cast<const float*>(rstd.const_data_ptr());
  params.dx = dx.mutable_data_ptr();
  params.dresidual = separate ? out.dresidual.mutable_data_ptr() : nullptr;
  params.dweight = weight ? out.dweight.mutable_data_ptr() : nullptr;
  params.dbias = bias ? out.dbias.mutable_data_ptr() : nullptr;
  params.N = N;
  params.C = C;
  params.dy_stride = row_stride(dy);
  params.dstream_stride = row_stride(dstream);
  params.stream_stride = row_stride(stream);
  params.dropout = dropout_params(rng, dropout_p);

  const auto device_index = stream.get_device_index();
  const DeviceScope scope(device_index);
  params.strips = norm_backward_strips(params, multiprocessors(device_index));
  const OptionalTensor dweight_partial = partial_of(weight, rstd, params.strips, C);
  const OptionalTensor dbias_partial = partial_of(bias, rstd, params.strips, C);
  params.dweight_partial = mutable_data_or_null<float>(dweight_partial);
  params.dbias_partial = mutable_data_or_null<float>(dbias_partial);
  raise_if_failed(norm_backward(params, current_stream(device_index)));
  return out;
}

void check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, "x must be [N, C] with C >= 1");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& rng, double eps, double dropout_p,
    ScalarType out_dtype, ScalarType residual_dtype) {
  check_x(x);
  const Tensor mean = empty_vector(x, x.size(0), ScalarType::Float);
  const ForwardOutputs out =
      forward(x, residual, weight, bias, rng, mean, eps, dropout_p, out_dtype, residual_dtype);
  return {out.y, out.stream, mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& dy, const OptionalTensor& dstream, const Tensor& stream,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& rng, double dropout_p, ScalarType x_dtype,
    std::optional<ScalarType> residual_dtype) {
  const BackwardOutputs out = backward(dy, dstream, stream, weight, bias, mean, rstd, rng,
                                       dropout_p, x_dtype, residual_dtype);
  return {out.dx, out.dresidual, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptionalTensor& residual,
                                                const OptionalTensor& weight,
                                                const OptionalTensor& rng, double eps,
                                                double dropout_p, ScalarType out_dtype,
                                                ScalarType residual_dtype) {
  check_x(x);
  const ForwardOutputs out = forward(x, residual, weight, std::nullopt, rng, std::nullopt, eps,
                                     dropout_p, out_dtype, residual_dtype);
  return {out.y, out.stream, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const OptionalTensor& dstream,
                                                const Tensor& stream, const OptionalTensor& weight,
                                                const Tensor& rstd, const OptionalTensor& rng,
                                                double dropout_p, ScalarType x_dtype,
                                                std::optional<ScalarType> residual_dtype) {
  const BackwardOutputs out = backward(dy, dstream, stream, weight, std::nullopt, std::nullopt,
                                       rstd, rng, dropout_p, x_dtype, residual_dtype);
  return {out.dx, out.dresidual, out.dweight};
}

}  // namespace fused_lm
