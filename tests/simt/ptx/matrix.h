// Host twin of csrc/ptx/matrix.h.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* rows, uint32_t lane_off = 0,
                        uint32_t fixed_off = 0, SIMT_HERE) {
  ::simt::ldmatrix(r, static_cast<const char*>(rows) + lane_off + fixed_off, 4, false, here);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* rows, uint32_t lane_off = 0,
                              uint32_t fixed_off = 0, SIMT_HERE) {
  ::simt::ldmatrix(r, static_cast<const char*>(rows) + lane_off + fixed_off, 4, true, here);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* rows, uint32_t lane_off = 0,
                        uint32_t fixed_off = 0, SIMT_HERE) {
  ::simt::ldmatrix(r, static_cast<const char*>(rows) + lane_off + fixed_off, 2, false, here);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* rows, uint32_t lane_off = 0,
                              uint32_t fixed_off = 0, SIMT_HERE) {
  ::simt::ldmatrix(r, static_cast<const char*>(rows) + lane_off + fixed_off, 2, true, here);
}
inline uint32_t movmatrix_trans(uint32_t r, SIMT_HERE) { return ::simt::movmatrix(r, here); }
inline void stmatrix_x4(void* row, const uint32_t (&r)[4], SIMT_HERE) {
  ::simt::stmatrix(r, row, 4, false, here);
}
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], SIMT_HERE) {
  ::simt::stmatrix(r, row, 4, true, here);
}

}  // namespace fused_lm::ptx
