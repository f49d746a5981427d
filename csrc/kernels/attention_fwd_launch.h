// Which kernel of the forward runs.
#pragma once

#include "kernels/attention_fwd_sm80.h"
#include "kernels/attention_fwd_teams_sm80.h"

namespace fused_lm {
namespace attention_fwd {

// shared_bytes: what a block of the current GPU may have.
template <class Element, int kD, bool kGeneral>
Status launch_head_dim(const AttentionForwardParams& p, size_t shared_bytes, Stream stream) {
  if constexpr (has_forward_teams(kD, kGeneral)) {
    using Teams = TeamConfig<kD, kGeneral>;
    constexpr size_t kBytes = sizeof(typename Teams::SharedStorage);
    constexpr int kMost = Teams::kTuning.warps * Teams::kTuning.blocks_per_sm;
    static_assert(resident_warps(Teams::kTuning, kBytes, kSharedBytesOfH100) == kMost);
    if (shared_bytes >= kSharedBytesOfA100 &&
        resident_warps(Teams::kTuning, kBytes, shared_bytes) == kMost) {
      return launch_teams<Element, kD, kGeneral>(p, stream);
    }
  }
  return launch_tiles<Element, kD, kGeneral>(p, stream);
}

template <class Element>
Status launch_any(const AttentionForwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if (is_plain(p.score, p.dropout)) {
      return launch_head_dim<Element, kD, false>(p, shared_bytes, stream);
    }
    return launch_head_dim<Element, kD, true>(p, shared_bytes, stream);
  });
}

}  // namespace attention_fwd
}  // namespace fused_lm
