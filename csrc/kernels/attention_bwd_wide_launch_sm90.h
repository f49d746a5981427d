// The launches of Hopper's attention backward above 128 columns.
#pragma once

#include "kernels/attention_bwd_launch_sm90.h"
#include "kernels/attention_bwd_wide_sm90.h"

namespace fused_lm {
namespace attention_bwd {

template <class Element>
Status launch_wide_backward(const AttentionBackwardParams& p, const HopperBackwardRoom& room,
                            Stream stream) {
  return with_backward_kernel<192, 256>(p, [&](auto dim, auto general) {
    return launch_hopper<Element, dim(), general()>(
        attention_bwd_wide_sm90<Element, dim(), general()>, p, room, stream);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
