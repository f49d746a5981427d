// Which kernel of the forward runs.
#pragma once

#include "kernels/attention_fwd_sm80.h"
#include "kernels/attention_fwd_teams_sm80.h"

namespace fused_lm {
namespace attention_fwd {

// shared_bytes: what a block of the current GPU may have.
template <class Element>
Status launch_any(const AttentionForwardParams& p, size_t shared_bytes, Stream stream) {
  return with_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if (!is_plain(p.score, p.dropout)) return launch_tiles<Element, kD, true>(p, stream);
    if constexpr (has_forward_teams(kD)) {
      static_assert(sizeof(typename TeamConfig<kD>::SharedStorage) <= kSharedBytesOfA100);
      const bool fits = shared_bytes >= sizeof(typename TeamConfig<kD>::SharedStorage);
      if (fits) return launch_teams<Element, kD>(p, stream);
    }
    return launch_tiles<Element, kD, false>(p, stream);
  });
}

}  // namespace attention_fwd
}  // namespace fused_lm
