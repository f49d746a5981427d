// Which of a kernel's blocks of teams run: those of 4 warps, those of 8, or none.
#pragma once

#include <cstddef>
#include <type_traits>

#include "common/types.h"
#include "kernels/attention_tuning.h"

namespace fused_lm {

// Teams: for each number of warps a config, Teams::Config<kWarps>, where Teams::kExists<kWarps>.
// shared_bytes: what a block of the GPU may have.
template <class Teams, int kWarps>
constexpr int resident_of(size_t shared_bytes) {
  if constexpr (Teams::template kExists<kWarps>) {
    using C = typename Teams::template Config<kWarps>;
    return resident_warps(C::kTuning, sizeof(typename C::SharedStorage), shared_bytes);
  }
  return 0;
}

// Warps of the blocks that run: those of which most are on a multiprocessor, rather few than many;
// 0 for the kernel without teams.
template <class Teams>
constexpr int team_block_warps(size_t shared_bytes) {
  if (shared_bytes < kSharedBytesOfA100) return 0;
  const int few = resident_of<Teams, 4>(shared_bytes);
  const int many = resident_of<Teams, 8>(shared_bytes);
  return few >= many ? (few > 0 ? 4 : 0) : 8;
}

// Compiled is what one of the sizes of shared memory that there are asks for.
template <class Teams, int kWarps>
constexpr bool kEverRuns = team_block_warps<Teams>(kSharedBytesOfA100) == kWarps ||
                           team_block_warps<Teams>(kSharedBytesOfH100) == kWarps;

// in_teams(warps as a constant), or otherwise() where no teams fit.
template <class Teams, class InTeams, class Otherwise>
Status launch_teams_or(size_t shared_bytes, const InTeams& in_teams, const Otherwise& otherwise) {
  const int warps = team_block_warps<Teams>(shared_bytes);
  if constexpr (kEverRuns<Teams, 4>) {
    if (warps == 4) return in_teams(std::integral_constant<int, 4>{});
  }
  if constexpr (kEverRuns<Teams, 8>) {
    if (warps == 8) return in_teams(std::integral_constant<int, 8>{});
  }
  return otherwise();
}

}  // namespace fused_lm
