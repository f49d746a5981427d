// Hopper's matrix product: the maps of its matrices, its schedule, the launch.
#pragma once

#include "kernels/gemm_sm90.h"

namespace fused_lm {
namespace gemm {

// Rows of memory with `columns` adjacent elements, in boxes of a slab. A single row has no stride
// of its own: any that is legal does.
inline Status map_matrix(ptx::TensorMap& map, const uint16_t* data, DType dtype, int columns,
                         int rows, int64_t stride, int box_rows) {
  const int64_t row_bytes = size_of(dtype) * (rows == 1 ? int64_t{columns} : stride);
  return encode_tensor_map(
      map,
      {data, dtype, 2, {columns, rows}, {0, row_bytes}, {kSlabColumns, box_rows}, Swizzle::k128});
}

inline Status map_operand(ptx::TensorMap& map, const GemmOperand& operand, DType dtype, int rows,
                          int K, int block_rows) {
  return operand.turned ? map_matrix(map, operand.data, dtype, rows, K, operand.stride, kGemmBlockK)
                        : map_matrix(map, operand.data, dtype, K, rows, operand.stride, block_rows);
}

template <class Element, GemmSchedule kSchedule, Layout kLayout, class Epilogue>
Status launch_gemm(const GemmParams& p, Stream stream) {
  using C = Config<Element, kSchedule, kLayout>;
  constexpr DType kDType = kDTypeOf<Element>;
  Arguments args{};
  args.M = p.M, args.N = p.N, args.K = p.K;
  args.tiles_m = gemm_row_tiles(p.M),
  args.tiles_n = static_cast<int>((int64_t{p.N} + C::kBlockN - 1) / C::kBlockN);
  args.group = C::kTuning.group;
  args.activation = p.activation;
  args.keeps_pre = p.pre != nullptr;
  args.bias = p.bias;
  args.total = p.total;
  args.partial = p.partial;
  const uint16_t* pre = C::kLoads ? p.source : p.pre;
  const Status statuses[] = {
      map_operand(args.a, p.a, kDType, p.M, p.K, kGemmBlockM),
      map_operand(args.b, p.b, kDType, p.N, p.K, C::kBlockN),
      p.out != nullptr ? map_matrix(args.out, p.out, kDType, p.N, p.M, p.N, C::kRows) : kOk,
      pre != nullptr ? map_matrix(args.pre, pre, kDType, p.N, p.M, p.N, C::kRows) : kOk,
  };
  for (const Status status : statuses) {
    if (status != kOk) return status;
  }
  const int64_t count = int64_t{args.tiles_m} * args.tiles_n;
  if (count > INT32_MAX - p.sms) return "a matrix product has at most 2^31 tiles";
  const LaunchConfig config{dim3(static_cast<unsigned>(count < p.sms ? count : p.sms)),
                            dim3(kThreads), sizeof(typename C::SharedStorage), stream};
  return launch(gemm_sm90<Element, kSchedule, kLayout, Epilogue>, config, args);
}

// Of the schedules that are compiled for the work, the one that is done first.
template <class Element, Layout kLayout>
Status launch_layer(const GemmParams& p, GemmWork work, GemmSchedule schedule, Stream stream) {
  constexpr GemmSchedule kWide = GemmSchedule::kCooperative256;
  constexpr GemmSchedule kHidden = GemmSchedule::kPingPong192;
  constexpr GemmSchedule kFew = GemmSchedule::kPingPong128;
  if (work == GemmWork::kBackward) {
    return launch_gemm<Element, GemmSchedule::kPingPong192Loads, kLayout,
                       ActivationBackwardEpilogue>(p, stream);
  }
  if (schedule == kFew) {
    return launch_gemm<Element, kFew, kLayout, ActivationEpilogue>(p, stream);
  }
  return work == GemmWork::kLinear
             ? launch_gemm<Element, kWide, kLayout, LinearEpilogue>(p, stream)
             : launch_gemm<Element, kHidden, kLayout, ActivationEpilogue>(p, stream);
}

// The gradient of a weight, or its sums added to a total.
template <class Element>
Status launch_gradient(const GemmParams& p, GemmWork work, GemmSchedule schedule, Stream stream) {
  constexpr Layout kLayout = Layout::kBothTurned;
  if (work == GemmWork::kGradient) {
    return launch_gemm<Element, GemmSchedule::kPingPong192, kLayout, GradientEpilogue>(p, stream);
  }
  return schedule == GemmSchedule::kPingPong128
             ? launch_gemm<Element, GemmSchedule::kPingPong128, kLayout, LinearEpilogue>(p, stream)
             : launch_gemm<Element, GemmSchedule::kCooperative256, kLayout, LinearEpilogue>(p,
                                                                                            stream);
}

template <class Element>
Status launch_any(const GemmParams& p, Stream stream) {
  const bool activates = p.activation != Activation::kNone || p.pre != nullptr;
  const GemmWork work = p.total.data != nullptr ? GemmWork::kGradient
                        : p.source != nullptr   ? GemmWork::kBackward
                        : activates             ? GemmWork::kActivation
                                                : GemmWork::kLinear;
  const GemmSchedule schedule = gemm_tuning_sm90(p.M, p.N, p.K, work, p.sms).schedule;
  if (p.a.turned) {
    if (!p.b.turned || activates || p.source != nullptr)
      return "only a weight's gradient has both operands turned";
    return launch_gradient<Element>(p, work, schedule, stream);
  }
  if (work == GemmWork::kGradient) return "only a weight's gradient is added to a total";
  return p.b.turned ? launch_layer<Element, Layout::kRightTurned>(p, work, schedule, stream)
                    : launch_layer<Element, Layout::kNoneTurned>(p, work, schedule, stream);
}

}  // namespace gemm
}  // namespace fused_lm
