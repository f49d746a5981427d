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
inline void add_quad(float* global, const float (&values)[4], SIMT_HERE) {
  ::simt::add_floats(global, values, 4, here);
}

}  // namespace fused_lm::ptx
