// Which kernels of the backward run. shared_bytes: what a block of the current GPU may have.
#pragma once

#include "kernels/attention_bwd_dkdv_sm80.h"
#include "kernels/attention_bwd_dq_sm80.h"
#include "kernels/attention_bwd_teams_sm80.h"

namespace fused_lm {
namespace attention_bwd {

using attention_dkdv::Part;

// The config of a pass in teams.
template <int kD, TeamPass kPass, bool kGeneral, int kWarps>
struct TeamsOf {
  using Config = TeamConfig<kD, kPass, kWarps, kGeneral>;
};
template <int kD, bool kGeneral, int kWarps>
struct TeamsOf<kD, TeamPass::kBoth, kGeneral, kWarps> {
  using Config = attention_dkdv::Config<kD, kGeneral, Part::kBoth, kWarps>;
};

template <int kD, TeamPass kPass, bool kGeneral, int kWarps>
constexpr int resident_of(size_t shared_bytes) {
  if constexpr (has_backward_teams(kD, kPass, kGeneral, kWarps)) {
    using C = typename TeamsOf<kD, kPass, kGeneral, kWarps>::Config;
    return resident_warps(C::kTuning, sizeof(typename C::SharedStorage), shared_bytes);
  }
  return 0;
}

// Warps of the blocks that run: those of which most are on a multiprocessor, rather few than many;
// 0 for the kernel without teams.
template <int kD, TeamPass kPass, bool kGeneral>
constexpr int team_block_warps(size_t shared_bytes) {
  if (shared_bytes < kSharedBytesOfA100) return 0;
  const int few = resident_of<kD, kPass, kGeneral, 4>(shared_bytes);
  const int many = resident_of<kD, kPass, kGeneral, 8>(shared_bytes);
  return few >= many ? (few > 0 ? 4 : 0) : 8;
}

// Compiled is what one of the sizes of shared memory that there are asks for.
template <int kD, TeamPass kPass, bool kGeneral, int kWarps>
constexpr bool kEverRuns = team_block_warps<kD, kPass, kGeneral>(kSharedBytesOfA100) == kWarps ||
                           team_block_warps<kD, kPass, kGeneral>(kSharedBytesOfH100) == kWarps;

template <class Element, int kD, TeamPass kPass, bool kGeneral, int kWarps>
Status launch_warps(const AttentionBackwardParams& p, Stream stream) {
  if constexpr (kPass == TeamPass::kBoth) {
    return attention_dkdv::launch_part<Element, kD, kGeneral, Part::kBoth, kWarps>(p, stream);
  } else {
    return launch_teams<Element, kD, kPass, kWarps, kGeneral>(p, stream);
  }
}

// A pass in teams; with otherwise() where none fit.
template <class Element, int kD, TeamPass kPass, bool kGeneral, class Otherwise>
Status launch_teams_or(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream,
                       const Otherwise& otherwise) {
  const int warps = team_block_warps<kD, kPass, kGeneral>(shared_bytes);
  if constexpr (kEverRuns<kD, kPass, kGeneral, 4>) {
    if (warps == 4) return launch_warps<Element, kD, kPass, kGeneral, 4>(p, stream);
  }
  if constexpr (kEverRuns<kD, kPass, kGeneral, 8>) {
    if (warps == 8) return launch_warps<Element, kD, kPass, kGeneral, 8>(p, stream);
  }
  return otherwise();
}

// Above kMaxJointHeadDim columns dv, then dk; general kernels alone where there are no teams.
template <class Element, int kD, bool kGeneral>
Status launch_keys(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  using attention_dkdv::launch_part;
  if constexpr (kD <= kMaxJointHeadDim) {
    return launch_teams_or<Element, kD, TeamPass::kBoth, kGeneral>(p, shared_bytes, stream, [&] {
      return launch_part<Element, kD, kGeneral, Part::kBoth, 0>(p, stream);
    });
  } else {
    const Status status = launch_teams_or<Element, kD, TeamPass::kValues, kGeneral>(
        p, shared_bytes, stream,
        [&] { return launch_part<Element, kD, true, Part::kValues, 0>(p, stream); });
    if (status != kOk) return status;
    return launch_teams_or<Element, kD, TeamPass::kKeys, kGeneral>(p, shared_bytes, stream, [&] {
      return launch_part<Element, kD, true, Part::kKeys, 0>(p, stream);
    });
  }
}

template <class Element, int kD, bool kGeneral>
Status launch_queries(const AttentionBackwardParams& p, size_t shared_bytes, Stream stream) {
  constexpr bool kFeatures = kGeneral || kD > kMaxJointHeadDim;
  return launch_teams_or<Element, kD, TeamPass::kQueries, kGeneral>(p, shared_bytes, stream, [&] {
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
