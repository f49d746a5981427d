// Linear layers with their activation: checks, allocation, launches. What
// fused_lm/triton_kernels/linear_act.py is for the Triton kernels.
#include "linear_act_ops.h"

#include "linear_products.h"

namespace fused_lm {
namespace {

// What kernels read in pairs.
OptionalTensor paired(const OptionalTensor& vector) {
  if (!vector) return std::nullopt;
  const Tensor packed = torch::stable::contiguous(*vector);
  const bool aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 4 == 0;
  return aligned ? packed : torch::stable::clone(packed);
}

// What a layer's gradients are made of: dpre, rows of adjacent columns, and dbias.
struct PreGradient {
  Tensor dpre, dbias;
};

PreGradient back_through(const Tensor& given_dy, const OptionalTensor& given_pre, bool needs_dbias,
                         const LayerActivation& layer, const DropoutParams& dropout,
                         ScalarType dtype) {
  const int64_t N = given_dy.size(0), F = given_dy.size(1), width = layer.parts() * F;
  const Matrix dy = matrix_of(given_dy, false);
  const bool wide = given_dy.scalar_type() != dtype;
  const bool makes_dpre = given_pre || wide || dropout.rng != nullptr;
  PreGradient found{dy.held, empty_vector(given_dy, needs_dbias ? width : 0, dtype)};
  if (!makes_dpre && !needs_dbias) return found;
  const OptionalTensor pre =
      given_pre ? OptionalTensor(matrix_of(*given_pre, false).held) : std::nullopt;
  STD_TORCH_CHECK(!pre || row_stride(pre) == width, "pre must be contiguous");
  if (makes_dpre) found.dpre = empty_rows(given_dy, N, width, dtype);
  const auto device_index = given_dy.get_device_index();
  const DeviceScope scope(device_index);
  const Stream stream = current_stream(device_index);
  ActivationBackwardParams p{};
  p.M = static_cast<int>(N), p.N = static_cast<int>(F);
  p.dy = dy.operand.data, p.dy_stride = dy.operand.stride;
  p.dy_is_wide = wide, p.dropout = dropout;
  p.pre = data_or_null<uint16_t>(pre);
  p.dpre = makes_dpre ? mutable_rows(found.dpre) : nullptr;
  p.activation = layer.activation, p.gated = layer.gated;
  p.strips = activation_strips(p.M, p.N, multiprocessors(device_index));
  const Tensor partial = empty_rows(given_dy, needs_dbias ? p.strips : 0, width, ScalarType::Float);
  p.partial = needs_dbias ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  raise_if_failed(activation_bwd(p, kernel_dtype(dtype, "x"), stream));
  if (!needs_dbias) return found;
  add_strips(found.dbias, partial);
  return found;
}

// Both operands of a product that lie K by rows: [K, M] and [K, N].
GemmParams turned_product(const Tensor& left, const Tensor& right) {
  GemmParams params{};
  params.M = static_cast<int>(left.size(1));
  params.N = static_cast<int>(right.size(1));
  params.K = static_cast<int>(left.size(0));
  params.a = lines_along(turned(left), 0).operand;
  params.b = lines_along(turned(right), 0).operand;
  return params;
}

// Whether rows of adjacent elements are what the epilogue adds to.
bool takes_total(const Tensor& t) {
  const auto alignment = 2 * (t.scalar_type() == ScalarType::Float ? 4 : 2);
  const bool apart = t.size(0) == 1 || (t.stride(0) % 2 == 0 && t.stride(0) >= t.size(1));
  return t.stride(1) == 1 && apart &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0;
}

// total [M, N] += left^T right, of [K, M] and [K, N].
void add_product(const Tensor& total, const Tensor& left, const Tensor& right) {
  if (!takes_total(total) && takes_total(turned(total))) {
    return add_product(turned(total), right, left);
  }
  const Tensor held = takes_total(total) ? total : torch::stable::clone(total);
  const Tensor rows = takes_total(held) ? held : torch::stable::contiguous(held);
  GemmParams params = turned_product(left, right);
  params.layer.total = {rows.mutable_data_ptr(), nullptr, row_stride(rows),
                        kernel_dtype(rows, "weight_grad")};
  run_gemm(params, left);
  Tensor target = total;
  if (rows.const_data_ptr() != total.const_data_ptr()) torch::stable::copy_(target, rows);
}

// left^T right, of [K, M] and [K, N], into `out` [M, N], dense either way round.
void store_product(const Tensor& out, const Tensor& left, const Tensor& right) {
  const bool by_rows = out.size(0) == 1 || out.stride(1) == 1;
  if (!by_rows) return store_product(turned(out), right, left);
  GemmParams params = turned_product(left, right);
  params.layer.out = mutable_rows(out);
  run_gemm(params, left);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, const Tensor& pre,
                                            const LayerActivation& layer, bool transposed,
                                            bool needs_dx, bool needs_dbias, bool needs_dweight,
                                            const OptionalTensor& weight_grad,
                                            const DropoutParams& dropout = {}) {
  const Tensor rows = weight_rows(weight, transposed);
  check_sizes(x, rows, bias, layer.parts());
  const int64_t N = x.size(0), width = rows.size(0), C = x.size(1);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == N && dy.size(1) * layer.parts() == width,
                  "dy must be [N, F]");
  check_device(dy, x, "dy");
  const bool activates = layer.activation != Activation::kNone;
  if (activates || dy.scalar_type() != ScalarType::Float) check_dtype(dy, dtype, "dy");
  if (activates) check_pre(pre, dy, width);
  const bool makes_dbias = needs_dbias && bias;
  const Tensor dx = needs_dx ? empty_rows(x, N, C, dtype) : empty_vector(x, 0, dtype);
  Tensor dweight = needs_dweight ? torch::stable::empty_like(weight) : empty_vector(x, 0, dtype);
  if (N == 0) {
    if (needs_dweight) torch::stable::zero_(dweight);
    const int64_t size = makes_dbias ? width : 0;
    return {dx, dweight, torch::stable::new_zeros(x, {&size, 1}, dtype)};
  }
  const PreGradient found = back_through(dy, activates ? OptionalTensor(pre) : std::nullopt,
                                         makes_dbias, layer, dropout, dtype);
  if (needs_dx) {
    const Matrix b = matrix_of(turned(rows), true);
    GemmParams params{};
    params.M = static_cast<int>(N), params.N = static_cast<int>(C);
    params.K = static_cast<int>(width);
    params.a = lines_along(found.dpre, 1).operand;
    params.b = b.operand;
    params.layer.out = mutable_rows(dx);
    run_gemm(params, x);
  }
  if (!needs_dweight && !weight_grad) return {dx, dweight, found.dbias};
  const Tensor held = matrix_of(x, false).held;
  const Tensor& first = transposed ? held : found.dpre;
  const Tensor& second = transposed ? found.dpre : held;
  if (weight_grad) {
    check_device(weight_grad, x, "weight_grad");
    add_product(*weight_grad, first, second);
  } else {
    store_product(dweight, first, second);
  }
  return {dx, dweight, found.dbias};
}

// What a forward reads, as its kernels take it.
struct LayerOperands {
  Matrix x, weight;
  OptionalTensor bias;

  LayerOperands(const Tensor& given_x, const Tensor& rows, const OptionalTensor& given_bias)
      : x(matrix_of(given_x, false)), weight(matrix_of(rows, true)), bias(paired(given_bias)) {}

  GemmParams product(int64_t F) const {
    GemmParams params{};
    params.M = static_cast<int>(x.held.size(0));
    params.N = static_cast<int>(F);
    params.K = static_cast<int>(x.held.size(1));
    params.a = x.operand;
    params.b = weight.operand;
    params.layer.bias = data_or_null<uint16_t>(bias);
    return params;
  }
};

// Rows as they are added to a stream that is as wide: contiguous, aligned to two elements.
Tensor stream_rows(const Tensor& t) {
  const Tensor packed = torch::stable::contiguous(t);
  return takes_total(packed) ? packed : torch::stable::clone(packed);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_act_fwd(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const OptionalTensor&,
                                          const std::string& activation, bool transposed,
                                          bool keep_pre) {
  const Tensor rows = weight_rows(weight, transposed);
  const LayerActivation layer = activation_of(activation);
  check_sizes(x, rows, bias, layer.parts());
  const int64_t N = x.size(0), width = rows.size(0), F = width / layer.parts();
  const Tensor y = empty_rows(x, N, F, x.scalar_type());
  const Tensor pre =
      keep_pre ? empty_rows(x, N, width, x.scalar_type()) : empty_vector(x, 0, x.scalar_type());
  if (N == 0) return {y, pre};
  const LayerOperands held(x, rows, bias);
  GemmParams params = held.product(F);
  params.layer.activation = layer.activation;
  params.layer.gated = layer.gated;
  params.layer.pre = keep_pre ? mutable_rows(pre) : nullptr;
  params.layer.out = mutable_rows(y);
  run_gemm(params, x);
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_bwd(const Tensor& dy, const Tensor& x,
                                                  const Tensor& weight, const OptionalTensor& bias,
                                                  const Tensor& pre, const std::string& activation,
                                                  bool transposed, bool needs_dx, bool needs_dbias,
                                                  bool needs_dweight) {
  return backward(dy, x, weight, bias, pre, activation_of(activation), transposed, needs_dx,
                  needs_dbias, needs_dweight, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> linear_act_bwd_add(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& pre, const std::string& activation, bool transposed, bool needs_dx,
    bool needs_dbias, bool needs_dweight, const Tensor& weight_grad) {
  STD_TORCH_CHECK(!needs_dweight, "dweight is added into weight_grad, and not made besides");
  STD_TORCH_CHECK(weight_grad.dim() == 2 && weight_grad.size(0) == weight.size(0) &&
                      weight_grad.size(1) == weight.size(1),
                  "weight_grad must have the shape of its weight");
  return backward(dy, x, weight, bias, pre, activation_of(activation), transposed, needs_dx,
                  needs_dbias, false, weight_grad);
}

Tensor linear_residual_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& residual, const OptionalTensor& given_rng,
                           double dropout_p, bool transposed) {
  const Tensor rows = weight_rows(weight, transposed);
  check_sizes(x, rows, bias);
  check_rng(given_rng, x);
  const int64_t N = x.size(0), F = rows.size(0);
  STD_TORCH_CHECK(residual.dim() == 2 && residual.size(0) == N && residual.size(1) == F,
                  "residual must be [N, F]");
  check_device(residual, x, "residual");
  const ScalarType dtype = residual.scalar_type();
  if (dtype != ScalarType::Float) check_dtype(residual, x.scalar_type(), "residual");
  const Tensor y = empty_rows(x, N, F, dtype);
  if (N == 0) return y;
  const LayerOperands held(x, rows, bias);
  const Tensor stream = stream_rows(residual);
  const OptionalTensor rng = contiguous(given_rng);
  GemmParams params = held.product(F);
  params.layer.total = {y.mutable_data_ptr(), stream.const_data_ptr(), F,
                        kernel_dtype(residual, "residual")};
  params.layer.dropout = dropout_params(rng, dropout_p);
  run_gemm(params, x);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_residual_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& given_rng, double dropout_p, bool transposed, bool needs_dx,
    bool needs_dbias, bool needs_dweight) {
  check_rng(given_rng, x);
  const OptionalTensor rng = contiguous(given_rng);
  return backward(dy, x, weight, bias, x, activation_of("none"), transposed, needs_dx, needs_dbias,
                  needs_dweight, std::nullopt, dropout_params(rng, dropout_p));
}

}  // namespace fused_lm
