// Host twin of csrc/ptx/zero.h.
#pragma once

#include <cstring>

#include "common/types.h"
#include "ptx/builtins.h"

namespace fused_lm {

inline Status zero_async(void* p, size_t bytes, Stream stream) {
  ::simt::checked_global(p, bytes, "zero_async", ::simt::Location::here());
  memset(p, 0, bytes);
  return kOk;
}

}  // namespace fused_lm
