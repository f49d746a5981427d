// The feed-forward network: checks, allocation, launches of the product whose epilogue
// goes back through the activation.
#include "ffn_ops.h"

#include "linear_products.h"

namespace fused_lm {

std::tuple<Tensor, Tensor> ffn_dpre(const Tensor& given_dy, const Tensor& weight,
                                    const Tensor& given_pre, const std::string& activation,
                                    bool transposed, bool needs_dbias) {
  // [F, C]: rows are the outputs of this product.
  const Tensor rows = turned(weight_rows(weight, transposed));
  check_sizes(given_dy, rows, std::nullopt);
  const int64_t N = given_dy.size(0), F = rows.size(0);
  const ScalarType dtype = given_dy.scalar_type();
  const LayerActivation layer = activation_of(activation);
  STD_TORCH_CHECK(layer.activation != Activation::kNone, "there is no activation to go through");
  const int64_t width = layer.parts() * F;
  check_pre(given_pre, given_dy, width);
  const Tensor dpre = empty_rows(given_dy, N, width, dtype);
  const int64_t sums = needs_dbias ? width : 0;
  if (N == 0) return {dpre, torch::stable::new_zeros(given_dy, {&sums, 1}, dtype)};
  const Tensor dbias = empty_vector(given_dy, sums, dtype);
  const Matrix dy = matrix_of(given_dy, false), b = matrix_of(rows, true);
  const Matrix pre = matrix_of(torch::stable::contiguous(given_pre), false);
  GemmParams params{};
  params.M = static_cast<int>(N);
  params.N = static_cast<int>(F);
  params.K = static_cast<int>(given_dy.size(1));
  params.a = dy.operand;
  params.b = b.operand;
  params.layer.activation = layer.activation;
  params.layer.gated = layer.gated;
  params.layer.source = pre.operand.data;
  params.layer.out = mutable_rows(dpre);
  const Tensor partial =
      empty_rows(given_dy, needs_dbias ? gemm_row_tiles(params.M) : 0, width, ScalarType::Float);
  params.layer.partial = needs_dbias ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  run_gemm(params, given_dy);
  if (needs_dbias) add_strips(dbias, partial);
  return {dpre, dbias};
}

}  // namespace fused_lm
