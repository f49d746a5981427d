// Mistakes with products of a warpgroup: d [64, 64] = a [64, 16] b [16, 64].
#include "planted/case.h"
#include "planted/operand.h"
#include "ptx/registers.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 128;
constexpr uint16_t kOne = 0x3f80;  // in bf16
constexpr size_t kOperands = sizeof(Operands);

// Row r is r % 4 + 1 at column r % 16, zeros elsewhere.
__device__ __forceinline__ void fill(Operand& operand) {
  static_assert(kThreads == 2 * kOperandRows, "half a row per thread");
  const int row = threadIdx.x / 2, first = threadIdx.x % 2 * 8;
  for (int k = first; k < first + 8; ++k) {
    operand.set(row, k, row % kOperandDepth == k ? static_cast<float>(row % 4 + 1) : 0.0f);
  }
}

__device__ __forceinline__ void multiply(Sums& d, const Operands& smem, bool accumulate) {
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), accumulate);
}

__device__ __forceinline__ float total(const Sums& d) {
  float sum = 0.0f;
  for (int n = 0; n < 8; ++n) {
    for (int e = 0; e < 4; ++e) sum += d[n][e] * (4 * n + e + 1);
  }
  return sum;
}

__device__ __forceinline__ void fill_both(Operands& smem) {
  fill(smem.a);
  fill(smem.b);
  ptx::fence_proxy_async();
  __syncthreads();
}

template <bool kBug>
__global__ void product_without_fence(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  if constexpr (!kBug) ptx::wgmma_fence();
  // BUG(plain,race,asan): no wgmma.fence since the last commit
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  finish(d);
  gOut[threadIdx.x] = total(d);
}
PLANT(product_without_fence, kThreads, kOperands);

// Each batch needs its own, and is waited for by itself.
template <bool kBug>
__global__ void second_product_without_fence(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d, other;
  ptx::wgmma_fence();
  multiply(d, smem, false);
  ptx::wgmma_commit();
  if constexpr (!kBug) ptx::wgmma_fence();
  // BUG(plain,race,asan): no wgmma.fence since the last commit
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(other, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::registers_fence(d);
  const float first = total(d);
  ptx::wgmma_wait<0>();
  ptx::registers_fence(other);
  gOut[threadIdx.x] = first + total(other);
}
PLANT(second_product_without_fence, kThreads, kOperands);

template <bool kBug>
__global__ void sums_touched_after_fence(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  multiply(d, smem, false);
  finish(d);
  if constexpr (kBug) ptx::wgmma_fence();
  for (int n = 0; n < 8; ++n) d[n][0] *= 2.0f;
  if constexpr (!kBug) ptx::wgmma_fence();
  // BUG(race): the sums of lane \d+ were touched after the last wgmma.fence
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), true);
  finish(d);
  gOut[threadIdx.x] = total(d);
}
PLANT(sums_touched_after_fence, kThreads, kOperands);

template <bool kBug>
__global__ void sums_read_in_flight(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  multiply(d, smem, false);
  ptx::wgmma_commit();
  if constexpr (!kBug) ptx::wgmma_wait<0>();
  gOut[threadIdx.x] = d[1][2];  // BUG(race): read of registers that a product is adding to
  if constexpr (kBug) ptx::wgmma_wait<0>();
}
PLANT(sums_read_in_flight, kThreads, kOperands);

template <bool kBug>
__global__ void sums_written_in_flight(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  // BUG(plain,asan): was written while a product was adding to it
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  ptx::wgmma_commit();
  if constexpr (!kBug) ptx::wgmma_wait<0>();
  d[1][2] = 5.0f;  // BUG(race): write of registers that a product is adding to
  if constexpr (kBug) ptx::wgmma_wait<0>();
  gOut[threadIdx.x] = total(d);
}
PLANT(sums_written_in_flight, kThreads, kOperands);

template <bool kBug>
__global__ void left_operand_changed_in_flight(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  uint32_t a[4] = {kOne, kOne, kOne, kOne};
  ptx::wgmma_fence();
  // BUG(plain,race,asan): register 0 of A in lane \d+ changed before the product was done
  ptx::wgmma_rs<__nv_bfloat16, 64, ptx::Major::kK>(d, a, smem.b.descriptor(), false);
  ptx::wgmma_commit();
  if constexpr (kBug) a[0] = 0;
  ptx::wgmma_wait<0>();
  a[0] = 0;
  gOut[threadIdx.x] = total(d) + a[0];
}
PLANT(left_operand_changed_in_flight, kThreads, kOperands);

template <bool kBug>
__global__ void operands_not_fenced(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill(smem.a);
  fill(smem.b);
  if constexpr (!kBug) ptx::fence_proxy_async();
  __syncthreads();
  Sums d;
  ptx::wgmma_fence();
  // BUG(race): asynchronous access to what was written without a proxy fence
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  finish(d);
  gOut[threadIdx.x] = total(d);
}
PLANT(operands_not_fenced, kThreads, kOperands);

template <bool kBug>
__global__ void operands_not_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill(smem.a);
  fill(smem.b);
  ptx::fence_proxy_async();
  if constexpr (!kBug) __syncthreads();
  Sums d;
  ptx::wgmma_fence();
  // BUG(race): (not ordered before|uninitialised)
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  finish(d);
  gOut[threadIdx.x] = total(d);
}
PLANT(operands_not_waited_for, kThreads, kOperands);

// All four warps read b; each waits for its own part of the product only.
template <bool kBug>
__global__ void operand_overwritten_in_flight(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  multiply(d, smem, false);
  finish(d);
  if constexpr (!kBug) __syncthreads();
  // BUG(race): write to data whose read is not ordered before it
  smem.b.element[threadIdx.x] = 0;
  gOut[threadIdx.x] = total(d);
}
PLANT(operand_overwritten_in_flight, kThreads, kOperands);

template <bool kBug>
__global__ void product_never_committed(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  multiply(d, smem, false);
  if constexpr (!kBug) ptx::wgmma_commit();
  ptx::wgmma_wait<0>();  // BUG(plain,race,asan): products that were never committed
  gOut[threadIdx.x] = total(d);
}
PLANT(product_never_committed, kThreads, kOperands);

template <bool kBug>
__global__ void product_never_waited_for(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  // BUG(plain,race,asan): products that nobody waited for
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  ptx::wgmma_commit();
  kBug ? ptx::wgmma_wait<1>() : ptx::wgmma_wait<0>();
  gOut[threadIdx.x] = gIn[threadIdx.x];
}
PLANT(product_never_waited_for, kThreads, kOperands);

template <bool kBug>
__global__ void descriptors_of_lanes_differ(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  fill_both(smem);
  Sums d;
  ptx::wgmma_fence();
  const uint64_t b = (kBug && threadIdx.x % 32 == 3 ? smem.a : smem.b).descriptor();
  // BUG(plain,race,asan): descriptors or scale-d of lanes 0 and 3 differ
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(), b,
                                                                   false);
  finish(d);
  gOut[threadIdx.x] = total(d);
}
PLANT(descriptors_of_lanes_differ, kThreads, kOperands);

template <bool kBug>
__global__ void more_registers_than_there_are(const float* gIn, float* gOut) {
  if (threadIdx.x / 128 == 0) {
    ptx::registers_decrease<24>();
  } else {
    // BUG(plain,race,asan): deadlock .*setmaxnreg at
    kBug ? ptx::registers_increase<248>() : ptx::registers_increase<240>();
  }
  gOut[threadIdx.x] = gIn[threadIdx.x];
}
PLANT(more_registers_than_there_are, 384);

// Nobody gives back what the others wait for.
template <bool kBug>
__global__ void registers_never_given_back(const float* gIn, float* gOut) {
  if (threadIdx.x / 128 > 0) {
    ptx::registers_increase<240>();  // BUG(plain,race,asan): deadlock .*setmaxnreg at
  } else {
    if constexpr (!kBug) ptx::registers_decrease<24>();
  }
  gOut[threadIdx.x] = gIn[threadIdx.x];
}
PLANT(registers_never_given_back, 384);

template <bool kBug>
__global__ void increase_that_is_none(const float* gIn, float* gOut) {
  if (threadIdx.x / 128 == 0) {
    ptx::registers_decrease<24>();
  } else {
    // BUG(plain,race,asan): increase from 168 to 160 registers
    kBug ? ptx::registers_increase<160>() : ptx::registers_increase<240>();
  }
  gOut[threadIdx.x] = gIn[threadIdx.x];
}
PLANT(increase_that_is_none, 384);

template <bool kBug>
__global__ void warps_of_a_group_part(const float* gIn, float* gOut) {
  if (threadIdx.x / 32 < (kBug ? 2 : 4)) {
    ptx::registers_decrease<40>();
  } else {
    ptx::registers_decrease<80>();  // BUG(plain,race,asan): the warps of a warpgroup differ
  }
  gOut[threadIdx.x] = gIn[threadIdx.x];
}
PLANT(warps_of_a_group_part, 256);

}  // namespace
}  // namespace planted
