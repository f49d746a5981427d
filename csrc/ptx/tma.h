// Asynchronous copies of boxes between a tensor and shared memory, by TMA (sm_90). One thread
// issues each. Coordinates are those of the box's first element, innermost dimension first; what
// lies outside of the tensor is read as zeros and not written. A box lies in shared memory at a
// multiple of 128 bytes, or of 8 rows of its map's swizzle.
#pragma once

#include "ptx/memory.h"
#include "ptx/tensor_map.h"

namespace fused_lm::ptx {

// Ranks 2 .. 5. A macro, since the text of an asm must be a literal: issue(rank, coordinates) is
// given the rank and the operands at[0] .. at[rank - 1].
#define FUSED_LM_TMA_RANKS(issue)                                                        \
  static_assert(kRank >= 2 && kRank <= 5, "a matrix at least, five dimensions at most"); \
  if constexpr (kRank == 2) {                                                            \
    issue(2, "r"(at[0]), "r"(at[1]));                                                    \
  } else if constexpr (kRank == 3) {                                                     \
    issue(3, "r"(at[0]), "r"(at[1]), "r"(at[2]));                                        \
  } else if constexpr (kRank == 4) {                                                     \
    issue(4, "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));                            \
  } else {                                                                               \
    issue(5, "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));                \
  }

// Operands of the coordinates: %2 and on, %3 and on, %4 and on.
#define FUSED_LM_FROM_2_2 "{%2, %3}"
#define FUSED_LM_FROM_2_3 "{%2, %3, %4}"
#define FUSED_LM_FROM_2_4 "{%2, %3, %4, %5}"
#define FUSED_LM_FROM_2_5 "{%2, %3, %4, %5, %6}"
#define FUSED_LM_FROM_3_2 "{%3, %4}"
#define FUSED_LM_FROM_3_3 "{%3, %4, %5}"
#define FUSED_LM_FROM_3_4 "{%3, %4, %5, %6}"
#define FUSED_LM_FROM_3_5 "{%3, %4, %5, %6, %7}"
#define FUSED_LM_FROM_4_2 "{%4, %5}"
#define FUSED_LM_FROM_4_3 "{%4, %5, %6}"
#define FUSED_LM_FROM_4_4 "{%4, %5, %6, %7}"
#define FUSED_LM_FROM_4_5 "{%4, %5, %6, %7, %8}"

// PTX 9.7.9.27, cp.async.bulk.tensor: a box to shared memory. The barrier, which expects them,
// counts its bytes, those of what is outside too.
template <int kRank>
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, uint64_t* barrier,
                                         const int (&at)[kRank]) {
#define FUSED_LM_ISSUE(rank, ...)                                                             \
  asm volatile("cp.async.bulk.tensor." #rank                                                  \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "                  \
               "[%0], [%1, " FUSED_LM_FROM_3_##rank "], [%2];" ::"r"(shared_address(shared)), \
               "l"(&map), "r"(shared_address(barrier)), __VA_ARGS__                           \
               : "memory")
  FUSED_LM_TMA_RANKS(FUSED_LM_ISSUE)
#undef FUSED_LM_ISSUE
}

// PTX 9.7.9.27, .multicast::cluster: to the same place in every block of the cluster whose bit is
// set, each of whose barriers counts the bytes.
template <int kRank>
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap& map,
                                                   uint64_t* barrier, const int (&at)[kRank],
                                                   uint16_t blocks) {
#define FUSED_LM_ISSUE(rank, ...)                                                                 \
  asm volatile("cp.async.bulk.tensor." #rank                                                      \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "   \
               "[%0], [%1, " FUSED_LM_FROM_4_##rank "], [%2], %3;" ::"r"(shared_address(shared)), \
               "l"(&map), "r"(shared_address(barrier)), "h"(blocks), __VA_ARGS__                  \
               : "memory")
  FUSED_LM_TMA_RANKS(FUSED_LM_ISSUE)
#undef FUSED_LM_ISSUE
}

// PTX 9.7.9.27, cp.async.bulk.tensor: a box from shared memory, which fence_proxy_async has made
// visible to TMA.
template <int kRank>
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared,
                                          const int (&at)[kRank]) {
#define FUSED_LM_ISSUE(rank, ...)                                     \
  asm volatile("cp.async.bulk.tensor." #rank                          \
               "d.global.shared::cta.tile.bulk_group "                \
               "[%0, " FUSED_LM_FROM_2_##rank "], [%1];" ::"l"(&map), \
               "r"(shared_address(shared)), __VA_ARGS__               \
               : "memory")
  FUSED_LM_TMA_RANKS(FUSED_LM_ISSUE)
#undef FUSED_LM_ISSUE
}

// PTX 9.7.9.28, cp.reduce.async.bulk.tensor: the same, added to what is there.
template <int kRank>
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared,
                                               const int (&at)[kRank]){
#define FUSED_LM_ISSUE(rank, ...)                                     \
  asm volatile("cp.reduce.async.bulk.tensor." #rank                   \
               "d.global.shared::cta.add.tile.bulk_group "            \
               "[%0, " FUSED_LM_FROM_2_##rank "], [%1];" ::"l"(&map), \
               "r"(shared_address(shared)), __VA_ARGS__               \
               : "memory")
    FUSED_LM_TMA_RANKS(FUSED_LM_ISSUE)
#undef FUSED_LM_ISSUE
}

#undef FUSED_LM_TMA_RANKS

// PTX 9.7.9.25, cp.async.bulk.commit_group: closes the group of this thread's stores since the
// last commit.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// PTX 9.7.9.25, cp.async.bulk.wait_group.read: of all but kPending of this thread's groups shared
// memory has been read, and may be written.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// PTX 9.7.9.25, cp.async.bulk.wait_group: at most kPending of them are under way.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// PTX 9.7.9.15, prefetch.tensormap: the map itself, before its first use.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// PTX 9.7.13, fence.proxy.async: what this thread wrote to shared memory becomes visible to TMA and
// wgmma, once a barrier has told the thread that issues them.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fused_lm::ptx
