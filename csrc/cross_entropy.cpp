// Cross entropy: checks, allocation, launches. What fused_lm/triton_kernels/cross_entropy.py is for
// the Triton kernels.
#include "cross_entropy_ops.h"

#include "common/device.h"
#include "kernels/cross_entropy.h"
#include "shared_memory.h"
#include "tensors.h"

namespace fused_lm {
namespace {

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;
};

IntegerType integer_type(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Long: return IntegerType::kInt64;
    case ScalarType::Int: return IntegerType::kInt32;
    case ScalarType::Short: return IntegerType::kInt16;
    case ScalarType::Char: return IntegerType::kInt8;
    case ScalarType::Byte: return IntegerType::kUInt8;
    default: break;
  }
  STD_TORCH_CHECK(false, "target must hold integers, got ",
                  torch::headeronly::toString(target.scalar_type()));
}

// Of a contiguous target.
Targets targets_of(const Tensor& target, int64_t ignore_index) {
  return {target.const_data_ptr(), integer_type(target), ignore_index};
}

void check_sizes(const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) >= 1, name, " must be [N, V] with V >= 1");
  STD_TORCH_CHECK(rows.size(0) <= INT32_MAX && rows.size(1) <= kMaxClasses, name,
                  " must have fewer than 2^31 rows and at most 2^30 classes, got [", rows.size(0),
                  ", ", rows.size(1), "]");
}

void check_logits(const Tensor& logits, const Tensor& target) {
  check_sizes(logits, "logits");
  check_vector(target, logits.size(0), logits, "target");
}

bool is_mean(const std::string& reduction) {
  STD_TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none",
                  "reduction must be one of mean, sum, none, got ", reduction);
  return reduction == "mean";
}

// Rows of [N, V] that a kernel overwrites.
void check_overwritten(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      (t.size(1) == 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1)), name,
      " must have contiguous rows apart from each other to be overwritten");
}

// Of one factor for all rows, [], or one each, [N].
int64_t factor_stride(const Tensor& factor, const Tensor& rows, const char* name) {
  check_device(factor, rows, name);
  check_dtype(factor, ScalarType::Float, name);
  if (factor.dim() == 0) return 0;
  check_vector(factor, rows.size(0), rows, name);
  return factor.stride(0);
}

CrossEntropyParams params_of(const Tensor& logits, const Tensor& target, const Options& options) {
  CrossEntropyParams params{};
  params.logits = logits.const_data_ptr();
  params.targets = targets_of(target, options.ignore_index);
  params.N = logits.size(0);
  params.V = logits.size(1);
  params.logits_stride = row_stride(logits);
  params.label_smoothing = static_cast<float>(options.label_smoothing);
  params.z_loss = static_cast<float>(options.z_loss);
  params.softcap = static_cast<float>(options.softcap);
  params.dtype = kernel_dtype(logits, "logits");
  return params;
}

void launch_rows(const CrossEntropyParams& params, int device_index) {
  raise_if_failed(cross_entropy_rows(params, shared_bytes_per_block(device_index),
                                     current_stream(device_index)));
}

// Makes the factor of a mean's gradients; what comes back must live until the launches.
OptionalTensor set_inverse_count(CrossEntropyParams& params, const Tensor& logits, bool mean) {
  if (!mean) return std::nullopt;
  const Tensor found = empty_vector(logits, 1, ScalarType::Float);
  auto* const inverse_count = static_cast<float*>(found.mutable_data_ptr());
  raise_if_failed(cross_entropy_inverse_count(params.targets, params.N, inverse_count,
                                              current_stream(logits.get_device_index())));
  params.inverse_count = inverse_count;
  return found;
}

// The gradient of rows whose columns are adjacent, which dlogits may be.
void gradient_into(const Tensor& dlogits, const Tensor& dloss, const Tensor& logits,
                   const Tensor& given_target, const Options& options, bool mean) {
  const int64_t weight_stride = factor_stride(dloss, logits, "dloss");
  const Tensor target = torch::stable::contiguous(given_target);
  CrossEntropyParams params = params_of(logits, target, options);
  params.dlogits = dlogits.mutable_data_ptr();
  params.dlogits_stride = row_stride(dlogits);
  params.weight = static_cast<const float*>(dloss.const_data_ptr());
  params.weight_stride = weight_stride;
  if (params.N == 0) return;
  const auto device_index = logits.get_device_index();
  const DeviceScope scope(device_index);
  const OptionalTensor inverse_count = set_inverse_count(params, logits, mean);
  launch_rows(params, device_index);
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& given_logits, const Tensor& given_target,
                                             int64_t ignore_index, double label_smoothing,
                                             double z_loss, double softcap,
                                             const std::string& reduction,
                                             const std::string& gradient) {
  check_logits(given_logits, given_target);
  const bool mean = is_mean(reduction);
  const Tensor logits = rows_contiguous(given_logits);
  const Tensor target = torch::stable::contiguous(given_target);
  CrossEntropyParams params =
      params_of(logits, target, {ignore_index, label_smoothing, z_loss, softcap});
  const bool wants_gradient = gradient == "with the loss";
  const Tensor loss = empty_vector(logits, params.N, ScalarType::Float);
  const Tensor dlogits = wants_gradient
                             ? empty_rows(logits, params.N, params.V, logits.scalar_type())
                             : empty_vector(logits, 0, logits.scalar_type());
  params.loss = static_cast<float*>(loss.mutable_data_ptr());

  const auto device_index = logits.get_device_index();
  const DeviceScope scope(device_index);
  OptionalTensor inverse_count;
  if (wants_gradient) {
    params.dlogits = dlogits.mutable_data_ptr();
    params.dlogits_stride = params.V;
    inverse_count = set_inverse_count(params, logits, mean);
  }
  launch_rows(params, device_index);
  if (reduction == "none") return {loss, dlogits};
  const Tensor total = torch::stable::new_empty(loss, {}, ScalarType::Float);
  raise_if_failed(cross_entropy_reduce(params.loss, params.targets, params.N, mean,
                                       static_cast<float*>(total.mutable_data_ptr()),
                                       current_stream(device_index)));
  return {total, dlogits};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& given_logits, const Tensor& target,
                         int64_t ignore_index, double label_smoothing, double z_loss,
                         double softcap, const std::string& reduction) {
  check_logits(given_logits, target);
  const Tensor logits = rows_contiguous(given_logits);
  const Tensor dlogits = empty_rows(logits, logits.size(0), logits.size(1), logits.scalar_type());
  gradient_into(dlogits, dloss, logits, target, {ignore_index, label_smoothing, z_loss, softcap},
                is_mean(reduction));
  return dlogits;
}

void cross_entropy_bwd_in_place(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                                int64_t ignore_index, double label_smoothing, double z_loss,
                                double softcap, const std::string& reduction) {
  check_logits(logits, target);
  check_overwritten(logits, "logits");
  gradient_into(logits, dloss, logits, target, {ignore_index, label_smoothing, z_loss, softcap},
                is_mean(reduction));
}

void cross_entropy_rows_in_place(const Tensor& logits, const Tensor& given_target,
                                 const Tensor& loss, const OptionalTensor& weights,
                                 int64_t ignore_index, double label_smoothing, double z_loss,
                                 double softcap, bool gradient) {
  check_logits(logits, given_target);
  check_overwritten(logits, "logits");
  check_vector(loss, logits.size(0), logits, "loss");
  check_dtype(loss, ScalarType::Float, "loss");
  STD_TORCH_CHECK(loss.size(0) <= 1 || loss.stride(0) == 1, "loss must be contiguous");
  const Tensor target = torch::stable::contiguous(given_target);
  CrossEntropyParams params =
      params_of(logits, target, {ignore_index, label_smoothing, z_loss, softcap});
  params.loss = static_cast<float*>(loss.mutable_data_ptr());
  if (gradient) {
    params.dlogits = logits.mutable_data_ptr();
    params.dlogits_stride = params.logits_stride;
  }
  if (weights) {
    params.weight_stride = factor_stride(*weights, logits, "weights");
    params.weight = data_or_null<float>(weights);
  }
  const auto device_index = logits.get_device_index();
  const DeviceScope scope(device_index);
  launch_rows(params, device_index);
}

void cross_entropy_scale_in_place(const Tensor& dlogits, const Tensor& dloss) {
  check_sizes(dlogits, "dlogits");
  STD_TORCH_CHECK(dlogits.is_contiguous(), "dlogits must be contiguous");
  const ScaleRowsParams params{dlogits.mutable_data_ptr(),
                               static_cast<const float*>(dloss.const_data_ptr()),
                               dlogits.size(0),
                               dlogits.size(1),
                               factor_stride(dloss, dlogits, "dloss"),
                               kernel_dtype(dlogits, "dlogits")};
  const auto device_index = dlogits.get_device_index();
  const DeviceScope scope(device_index);
  raise_if_failed(scale_rows(params, current_stream(device_index)));
}

}  // namespace fused_lm
