// Which kernel of the forward runs.
#pragma once

#include "kernels/attention_fwd_sm80.h"
#include "kernels/attention_fwd_teams_sm80.h"
#include "kernels/attention_team_launch.h"

namespace fused_lm {
namespace attention_fwd {

// As attention_team_launch.h wants it.
template <int kD, bool kGeneral>
struct TeamsOf {
  template <int kWarps>
  using Config = TeamConfig<kD, kWarps, kGeneral>;
  template <int kWarps>
  static constexpr bool kExists = has_forward_teams(kD, kGeneral, kWarps);
};

// shared_bytes: what a block of the current GPU may have.
template <class Element, int kD, bool kGeneral>
Status launch_head_dim(const AttentionForwardParams& p, size_t shared_bytes, Stream stream) {
  return launch_teams_or<TeamsOf<kD, kGeneral>>(
      shared_bytes,
      [&](auto warps) {
        return launch_teams<Element, kD, decltype(warps)::value, kGeneral>(p, stream);
      },
      [&] { return launch_tiles<Element, kD, kGeneral>(p, stream); });
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
