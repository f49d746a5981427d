// The launch of gemm_sm80.h: which kernel a product takes.
#pragma once

#include "kernels/gemm_sm80.h"

namespace fused_lm {
namespace gemm {

template <class Element, Layout kLayout, template <DType> class Finish>
Status launch_portable(const GemmParams& p, Stream stream) {
  using C = PortableConfig<Element, kLayout, Finish<kDTypeOf<Element>>::kReads == 2>;
  const int64_t tiles =
      int64_t{gemm_row_tiles(p.M)} * ((int64_t{p.N} + C::kColumns - 1) / C::kColumns);
  if (tiles > INT32_MAX) return "a matrix product has at most 2^31 tiles";
  const LaunchConfig config{dim3(static_cast<unsigned>(tiles)), dim3(C::kThreads),
                            sizeof(typename C::SharedStorage), stream};
  return launch(gemm_sm80<Element, kLayout, Finish>, config, p);
}

// Forward, gradient of x, and back through an activation.
template <class Element, Layout kLayout>
Status launch_portable_layer(const GemmParams& p, GemmWork work, Stream stream) {
  switch (work) {
    case GemmWork::kBackward:
      return launch_portable<Element, kLayout, FinishActivationBackward>(p, stream);
    case GemmWork::kResidual: return launch_portable<Element, kLayout, FinishResidual>(p, stream);
    case GemmWork::kGated: return launch_portable<Element, kLayout, FinishGated>(p, stream);
    case GemmWork::kGatedBackward:
      return launch_portable<Element, kLayout, FinishGatedBackward>(p, stream);
    default: return launch_portable<Element, kLayout, FinishActivation>(p, stream);
  }
}

template <class Element>
Status launch_any_portable(const GemmParams& p, Stream stream) {
  const GemmWork work = gemm_work(p.layer);
  const Status status = gemm_refusal(p, work);
  if (status != kOk) return status;
  if (!p.a.turned) {
    return p.b.turned ? launch_portable_layer<Element, Layout::kRightTurned>(p, work, stream)
                      : launch_portable_layer<Element, Layout::kNoneTurned>(p, work, stream);
  }
  return work == GemmWork::kGradient
             ? launch_portable<Element, Layout::kBothTurned, FinishGradient>(p, stream)
             : launch_portable<Element, Layout::kBothTurned, FinishActivation>(p, stream);
}

}  // namespace gemm
}  // namespace fused_lm
