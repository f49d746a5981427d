// Which kernels of the backward run. shared_bytes: what a block of the current GPU may have.
#pragma once

#include "kernels/attention_bwd_dkdv_sm80.h"
#include "kernels/attention_bwd_dq_sm80.h"
#include "kernels/attention_bwd_teams_sm80.h"

namespace fused_lm {
namespace attention_bwd {

// A pass in teams, with as many warps as fit; with otherwise() where none do.
template <class Element, int kD, TeamPass kPass, class Otherwise>
Status launch_teams_or(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream,
                       const Otherwise& otherwise) {
  constexpr int kWarps = kTeamBlockWarps;
  if (shared_bytes >= sizeof(typename TeamConfig<kD, kPass, kWarps>::SharedStorage)) {
    return launch_teams<Element, kD, kPass, kWarps>(p, stream);
  }
  if constexpr (has_small_team_blocks(kD, kPass)) {
    if (shared_bytes >= sizeof(typename TeamConfig<kD, kPass, kWarps / 2>::SharedStorage)) {
      return launch_teams<Element, kD, kPass, kWarps / 2>(p, stream);
    }
  }
  return otherwise();
}

// dk and dv of head dims whose sums fit into one launch.
template <class Element, int kD>
Status launch_joint(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  using attention_dkdv::Config;
  using attention_dkdv::launch_part;
  using attention_dkdv::Part;
  if (!is_plain(p.score, p.dropout)) {
    return launch_part<Element, kD, true, Part::kBoth, false>(p, stream);
  }
  if constexpr (has_dkdv_teams(kD)) {
    using Teams = Config<kD, false, Part::kBoth, true>;
    static_assert(sizeof(typename Teams::SharedStorage) <= kSharedBytesOfA100);
    if (shared_bytes >= sizeof(typename Teams::SharedStorage)) {
      return launch_part<Element, kD, false, Part::kBoth, true>(p, stream);
    }
  }
  return launch_part<Element, kD, false, Part::kBoth, false>(p, stream);
}

// Of wider ones: dv, then dk.
template <class Element, int kD>
Status launch_parts(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  using attention_dkdv::launch_part;
  using attention_dkdv::Part;
  const auto general_values = [&] {
    return launch_part<Element, kD, true, Part::kValues, false>(p, stream);
  };
  const auto general_keys = [&] {
    return launch_part<Element, kD, true, Part::kKeys, false>(p, stream);
  };
  if (!is_plain(p.score, p.dropout)) {
    const Status status = general_values();
    return status != kOk ? status : general_keys();
  }
  const Status status =
      launch_teams_or<Element, kD, TeamPass::kValues>(p, shared_bytes, stream, general_values);
  if (status != kOk) return status;
  return launch_teams_or<Element, kD, TeamPass::kKeys>(p, shared_bytes, stream, general_keys);
}

template <class Element>
Status launch_dkdv(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if constexpr (kD <= kMaxJointHeadDim) {
      return launch_joint<Element, kD>(p, shared_bytes, stream);
    } else {
      return launch_parts<Element, kD>(p, shared_bytes, stream);
    }
  });
}

template <class Element>
Status launch_dq(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    using attention_dq::launch_tiles;
    const auto general = [&] { return launch_tiles<Element, kD, true>(p, stream); };
    if (!is_plain(p.score, p.dropout)) return general();
    if constexpr (kD <= kMaxJointHeadDim) {
      return launch_tiles<Element, kD, false>(p, stream);
    } else {
      return launch_teams_or<Element, kD, TeamPass::kQueries>(p, shared_bytes, stream, general);
    }
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
