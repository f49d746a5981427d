// Which kernels of the backward run. shared_bytes: what a block of the current GPU may have.
#pragma once

#include "kernels/attention_bwd_dkdv_sm80.h"
#include "kernels/attention_bwd_dq_sm80.h"
#include "kernels/attention_bwd_teams_sm80.h"
#include "kernels/attention_team_launch.h"

namespace fused_lm {
namespace attention_bwd {

using attention_dkdv::Part;

// A pass in teams, as attention_team_launch.h wants it.
template <int kD, TeamPass kPass, bool kGeneral>
struct TeamsOf {
  template <int kWarps>
  using Config = TeamConfig<kD, kPass, kWarps, kGeneral>;
  template <int kWarps>
  static constexpr bool kExists = has_backward_teams(kD, kPass, kGeneral, kWarps);
};
template <int kD, bool kGeneral>
struct TeamsOf<kD, TeamPass::kBoth, kGeneral> {
  template <int kWarps>
  using Config = attention_dkdv::Config<kD, kGeneral, Part::kBoth, kWarps>;
  template <int kWarps>
  static constexpr bool kExists = has_backward_teams(kD, TeamPass::kBoth, kGeneral, kWarps);
};

// A pass in teams; with otherwise() where none fit.
template <class Element, int kD, TeamPass kPass, bool kGeneral, class Otherwise>
Status launch_pass(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream,
                   const Otherwise& otherwise) {
  const auto in_teams = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    if constexpr (kPass == TeamPass::kBoth) {
      return attention_dkdv::launch_part<Element, kD, kGeneral, Part::kBoth, kWarps>(p, stream);
    } else {
      return launch_teams<Element, kD, kPass, kWarps, kGeneral>(p, stream);
    }
  };
  return launch_teams_or<TeamsOf<kD, kPass, kGeneral>>(shared_bytes, in_teams, otherwise);
}

// Above kMaxJointHeadDim columns dv, then dk; general kernels alone where there are no teams.
template <class Element, int kD, bool kGeneral>
Status launch_keys(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  using attention_dkdv::launch_part;
  if constexpr (kD <= kMaxJointHeadDim) {
    return launch_pass<Element, kD, TeamPass::kBoth, kGeneral>(p, shared_bytes, stream, [&] {
      return launch_part<Element, kD, kGeneral, Part::kBoth, 0>(p, stream);
    });
  } else {
    const Status status = launch_pass<Element, kD, TeamPass::kValues, kGeneral>(
        p, shared_bytes, stream,
        [&] { return launch_part<Element, kD, true, Part::kValues, 0>(p, stream); });
    if (status != kOk) return status;
    return launch_pass<Element, kD, TeamPass::kKeys, kGeneral>(p, shared_bytes, stream, [&] {
      return launch_part<Element, kD, true, Part::kKeys, 0>(p, stream);
    });
  }
}

template <class Element, int kD, bool kGeneral>
Status launch_queries(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  constexpr bool kFeatures = kGeneral || kD > kMaxJointHeadDim;
  return launch_pass<Element, kD, TeamPass::kQueries, kGeneral>(p, shared_bytes, stream, [&] {
    return attention_dq::launch_tiles<Element, kD, kFeatures>(p, stream);
  });
}

template <class Element>
Status launch_dkdv(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if (is_plain(p.score, p.dropout)) {
      return launch_keys<Element, kD, false>(p, shared_bytes, stream);
    }
    return launch_keys<Element, kD, true>(p, shared_bytes, stream);
  });
}

template <class Element>
Status launch_dq(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if (is_plain(p.score, p.dropout)) {
      return launch_queries<Element, kD, false>(p, shared_bytes, stream);
    }
    return launch_queries<Element, kD, true>(p, shared_bytes, stream);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
