// Host twin of csrc/ptx/tma.h.
#pragma once

#include "ptx/memory.h"
#include "ptx/tensor_map.h"

namespace fused_lm::ptx {

template <int kRank>
void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, const int (&at)[kRank],
              SIMT_HERE) {
  ::simt::tma_load(shared, map, barrier, at, kRank, 0, here);
}
template <int kRank>
void tma_load_multicast(void* shared, const TensorMap& map, uint64_t* barrier,
                        const int (&at)[kRank], uint16_t blocks, SIMT_HERE) {
  ::simt::tma_load(shared, map, barrier, at, kRank, blocks, here);
}
template <int kRank>
void tma_store(const TensorMap& map, const void* shared, const int (&at)[kRank], SIMT_HERE) {
  ::simt::tma_store(map, shared, at, kRank, false, here);
}
template <int kRank>
void tma_reduce_add(const TensorMap& map, const void* shared, const int (&at)[kRank], SIMT_HERE) {
  ::simt::tma_store(map, shared, at, kRank, true, here);
}
inline void bulk_commit(SIMT_HERE) { ::simt::bulk_commit(here); }
template <int kPending>
void bulk_wait_read(SIMT_HERE) {
  ::simt::bulk_wait(kPending, true, here);
}
template <int kPending>
void bulk_wait(SIMT_HERE) {
  ::simt::bulk_wait(kPending, false, here);
}
inline void tma_prefetch(const TensorMap& map) {}
inline void fence_proxy_async(SIMT_HERE) { ::simt::fence_proxy_async(here); }

}  // namespace fused_lm::ptx
