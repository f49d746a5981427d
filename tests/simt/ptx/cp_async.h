// Host twin of csrc/ptx/cp_async.h.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

inline void cp_async_16(void* shared, const void* global, int source_bytes = 16, SIMT_HERE) {
  ::simt::cp_async(shared, global, 16, source_bytes, here);
}

template <int kBytes>
void cp_async_small(void* shared, const void* global, int source_bytes = kBytes, SIMT_HERE) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  ::simt::cp_async(shared, global, kBytes, source_bytes, here);
}

inline void cp_async_commit(SIMT_HERE) { ::simt::cp_async_commit(here); }

template <int kPending>
void cp_async_wait(SIMT_HERE) {
  ::simt::cp_async_wait(kPending, here);
}

}  // namespace fused_lm::ptx
