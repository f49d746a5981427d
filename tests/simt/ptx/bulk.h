// Host twin of csrc/ptx/bulk.h.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                      SIMT_HERE) {
  ::simt::bulk_load(shared, global, bytes, barrier, here);
}
inline void bulk_add(float* global, const float* shared, uint32_t bytes, SIMT_HERE) {
  ::simt::bulk_add(global, shared, bytes, here);
}
__attribute__((no_sanitize("thread"))) inline void add_quad(float* global, const float (&values)[4],
                                                            SIMT_HERE) {
  ::simt::note_atomic(global, 4 * sizeof(float), here);
  for (int i = 0; i < 4; ++i) global[i] += values[i];
}

}  // namespace fused_lm::ptx
