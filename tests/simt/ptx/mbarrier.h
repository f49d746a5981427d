// Host twin of csrc/ptx/mbarrier.h.
#pragma once

#include "ptx/memory.h"

namespace fused_lm::ptx {

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals, SIMT_HERE) {
  ::simt::mbarrier_init(barrier, arrivals, here);
}
inline void mbarrier_invalidate(uint64_t* barrier, SIMT_HERE) {
  ::simt::mbarrier_invalidate(barrier, here);
}
inline void mbarrier_arrive(uint64_t* barrier, SIMT_HERE) {
  ::simt::mbarrier_arrive(barrier, here);
}
inline void mbarrier_arrive_cp_async(uint64_t* barrier, SIMT_HERE) {
  ::simt::mbarrier_arrive_cp_async(barrier, here);
}
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes, SIMT_HERE) {
  ::simt::mbarrier_expect(barrier, bytes, false, here);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, SIMT_HERE) {
  ::simt::mbarrier_expect(barrier, bytes, true, here);
}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank, SIMT_HERE) {
  ::simt::mbarrier_arrive_at(barrier, rank, here);
}
inline void fence_mbarrier_init(SIMT_HERE) { ::simt::fence_mbarrier_init(here); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, SIMT_HERE) {
  ::simt::mbarrier_wait(barrier, parity, here);
}

}  // namespace fused_lm::ptx
