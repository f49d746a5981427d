// Hopper's matrix product: the maps of its matrices, its schedule, the launch.
#pragma once

#include "kernels/gemm_parts_sm90.h"
#include "kernels/gemm_sm90.h"
#include "ptx/cluster.h"

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

// shares: of a tile, each a box of its own.
inline Status map_operand(ptx::TensorMap& map, const GemmOperand& operand, DType dtype, int rows,
                          int K, int block_rows, int shares) {
  return operand.turned
             ? map_matrix(map, operand.data, dtype, rows, K, operand.stride, kGemmBlockK / shares)
             : map_matrix(map, operand.data, dtype, K, rows, operand.stride, block_rows / shares);
}

template <class C>
Status make_arguments(Arguments& args, const GemmParams& p) {
  constexpr DType kDType = kDTypeOf<typename C::Element>;
  args.M = p.M, args.N = p.N, args.K = p.K;
  args.tiles_m = gemm_row_tiles(p.M);
  const GemmWork work = gemm_work(p.layer);
  const bool gated = work == GemmWork::kGated;
  args.tile_columns = gated ? C::kBlockN / 2 : C::kBlockN;
  args.next_half = gated ? p.N : C::kBlockN / 2;
  args.tiles_n = static_cast<int>((int64_t{p.N} + args.tile_columns - 1) / args.tile_columns);
  args.group = C::kTuning.group;
  args.cluster = C::kCluster;
  args.layer = p.layer;
  args.parts = p.parts;
  const auto map_results = [&](ptx::TensorMap& map, ptx::TensorMap& values, const uint16_t* data,
                               int64_t parts) {
    if (data == nullptr) return kOk;
    const Status status = map_matrix(map, data, kDType, p.N, p.M, parts * p.N, C::kRows);
    if (parts == 1 || status != kOk) return status;
    return map_matrix(values, data + p.N, kDType, p.N, p.M, parts * p.N, C::kRows);
  };
  const Status statuses[] = {
      map_operand(args.a, p.a, kDType, p.M, p.K, kGemmBlockM, 1),
      map_operand(args.b, p.b, kDType, gemm_columns(p.N, work), p.K, C::kBlockN, C::kShares),
      map_results(args.out, args.out_values, p.layer.out, work == GemmWork::kGatedBackward ? 2 : 1),
      map_results(args.pre, args.pre_values, C::kLoads ? p.layer.source : p.layer.pre,
                  p.layer.gated ? 2 : 1),
  };
  for (const Status status : statuses) {
    if (status != kOk) return status;
  }
  return kOk;
}

inline LaunchConfig launch_of(int64_t blocks, int threads, size_t smem_bytes, Stream stream) {
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), smem_bytes,
          stream};
}

// The first `whole` tiles, or all.
template <class Element, GemmSchedule kSchedule, Layout kLayout, class Epilogue>
Status launch_gemm(const GemmParams& p, Stream stream, int64_t whole = INT32_MAX) {
  using C = Config<Element, kSchedule, kLayout>;
  Arguments args{};
  const Status status = make_arguments<C>(args, p);
  if (status != kOk) return status;
  const int64_t tiles = gemm_tiles(C::kTuning, p.M, gemm_columns(p.N, gemm_work(p.layer)));
  const int64_t count = tiles < whole ? tiles : whole;
  if (count > INT32_MAX - p.sms) return "a matrix product has at most 2^31 tiles";
  args.whole = static_cast<int>(count);
  const int64_t at_once = gemm_blocks(C::kTuning, p.sms);
  const LaunchConfig config = launch_of(count < at_once ? count : at_once, kThreads,
                                        sizeof(typename C::SharedStorage), stream);
  const auto kernel = gemm_sm90<Element, kSchedule, kLayout, Epilogue>;
  if constexpr (C::kCluster == 1) return launch(kernel, config, args);
  return launch_clusters(kernel, config, C::kCluster, args);
}

// The tiles that blocks share, and what is done with their sums.
template <class Element, Layout kLayout>
Status launch_shared(const GemmParams& p, GemmWork work, const GemmPlan& plan, Stream stream) {
  using C = PartConfig<Element, kLayout>;
  Arguments args{};
  Status status = make_arguments<C>(args, p);
  if (status != kOk) return status;
  args.whole = static_cast<int>(plan.whole);
  if (plan.whole > 0) args.cluster = plan.tuning.cluster;
  args.shares = {static_cast<int>(plan.steps / plan.blocks),
                 static_cast<int>(plan.steps % plan.blocks)};
  status =
      launch(gemm_parts_sm90<Element, kLayout>,
             launch_of(plan.blocks, kThreads, sizeof(typename C::SharedStorage), stream), args);
  if (status != kOk) return status;
  const int64_t shared = int64_t{args.tiles_m} * args.tiles_n - plan.whole;
  const auto join = [&](const auto& kernel, int64_t strips, size_t smem_bytes) {
    return launch(kernel, launch_of(shared * strips, kJoinThreads, smem_bytes, stream), args);
  };
  switch (work) {
    case GemmWork::kGradient: return join(gemm_add_parts<Element, FinishGradient>, C::kSlabs, 0);
    case GemmWork::kResidual: return join(gemm_add_parts<Element, FinishResidual>, C::kSlabs, 0);
    case GemmWork::kGated: return join(gemm_add_parts<Element, FinishGated>, C::kSlabs / 2, 0);
    case GemmWork::kBackward:
      return join(gemm_add_parts<Element, FinishActivationBackward>, C::kSlabs, sizeof(JoinSums));
    case GemmWork::kGatedBackward:
      return join(gemm_add_parts<Element, FinishGatedBackward>, C::kSlabs, sizeof(JoinSums));
    default: return join(gemm_add_parts<Element, FinishActivation>, C::kSlabs, 0);
  }
}

// Tiles of 128 x 256: those in front of the shared ones, or all.
template <class Element, Layout kLayout>
Status launch_whole(const GemmParams& p, GemmWork work, Stream stream, int64_t whole = INT32_MAX) {
  if constexpr (kLayout != Layout::kBothTurned) {
    if (work == GemmWork::kGated) {
      return launch_gemm<Element, kPartSchedule, kLayout, GatedEpilogue>(p, stream, whole);
    }
  }
  return launch_gemm<Element, kPartSchedule, kLayout, LinearEpilogue>(p, stream, whole);
}

// All of a product, if tiles are shared.
template <class Element, Layout kLayout>
Status launch_plan(const GemmParams& p, GemmWork work, const GemmPlan& plan, Stream stream) {
  if (plan.whole > 0) {
    const Status status = launch_whole<Element, kLayout>(p, work, stream, plan.whole);
    if (status != kOk) return status;
  }
  return launch_shared<Element, kLayout>(p, work, plan, stream);
}

// Of the schedules that are compiled for the work, the one that is done first.
template <class Element, Layout kLayout>
Status launch_layer(const GemmParams& p, GemmWork work, const GemmPlan& plan, Stream stream) {
  if (plan.blocks > 0) return launch_plan<Element, kLayout>(p, work, plan, stream);
  constexpr GemmSchedule kHidden = GemmSchedule::kPingPong192;
  constexpr GemmSchedule kFew = GemmSchedule::kPingPong128;
  constexpr GemmSchedule kLoads = GemmSchedule::kPingPong192Loads;
  if (work == GemmWork::kBackward) {
    return launch_gemm<Element, kLoads, kLayout, ActivationBackwardEpilogue>(p, stream);
  }
  if (work == GemmWork::kGatedBackward) {
    return launch_gemm<Element, kLoads, kLayout, GatedBackwardEpilogue>(p, stream);
  }
  if (work == GemmWork::kResidual) {
    return launch_gemm<Element, kHidden, kLayout, ResidualEpilogue>(p, stream);
  }
  if (plan.tuning.schedule == kFew) {
    return launch_gemm<Element, kFew, kLayout, ActivationEpilogue>(p, stream);
  }
  return work == GemmWork::kActivation
             ? launch_gemm<Element, kHidden, kLayout, ActivationEpilogue>(p, stream)
             : launch_whole<Element, kLayout>(p, work, stream);
}

// The gradient of a weight, or its sums added to a total.
template <class Element>
Status launch_gradient(const GemmParams& p, GemmWork work, const GemmPlan& plan, Stream stream) {
  constexpr Layout kLayout = Layout::kBothTurned;
  if (plan.blocks > 0) return launch_plan<Element, kLayout>(p, work, plan, stream);
  if (work == GemmWork::kGradient) {
    return launch_gemm<Element, GemmSchedule::kPingPong192, kLayout, GradientEpilogue>(p, stream);
  }
  return plan.tuning.schedule == GemmSchedule::kPingPong128
             ? launch_gemm<Element, GemmSchedule::kPingPong128, kLayout, LinearEpilogue>(p, stream)
             : launch_whole<Element, kLayout>(p, work, stream);
}

template <class Element>
Status launch_any(const GemmParams& p, Stream stream) {
  const GemmWork work = gemm_work(p.layer);
  const Status refusal = gemm_refusal(p, work);
  if (refusal != kOk) return refusal;
  const GemmPlan plan = gemm_plan_sm90(p.M, p.N, p.K, work, p.sms);
  if (plan.slots > 0 && p.parts == nullptr) return "there is no room for the sums of parts";
  if (p.a.turned) return launch_gradient<Element>(p, work, plan, stream);
  return p.b.turned ? launch_layer<Element, Layout::kRightTurned>(p, work, plan, stream)
                    : launch_layer<Element, Layout::kNoneTurned>(p, work, plan, stream);
}

}  // namespace gemm
}  // namespace fused_lm
