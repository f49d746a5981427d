// Which lane of a warpgroup holds which element of a product, as fragments.cu shows it of a warp.
#include "planted/case.h"
#include "planted/operand.h"
#include "ptx/tma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kThreads = 128;

__device__ __forceinline__ void share(Operands& smem) {
  ptx::fence_proxy_async();
  __syncthreads();
}

// d is the number of its row, or of its column: gOut[thread][register].
template <bool kColumns>
__global__ void fragments_wgmma_d(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  const int row = threadIdx.x / 2, first = threadIdx.x % 2 * 8;
  for (int k = first; k < first + 8; ++k) {
    const float number = static_cast<float>(row), one = 1.0f;
    smem.a.set(row, k, k > 0 ? 0.0f : kColumns ? one : number);
    smem.b.set(row, k, k > 0 ? 0.0f : kColumns ? number : one);
  }
  share(smem);
  Sums d;
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, 64, ptx::Major::kK, ptx::Major::kK>(d, smem.a.descriptor(),
                                                                   smem.b.descriptor(), false);
  finish(d);
  for (int i = 0; i < 32; ++i) gOut[32 * threadIdx.x + i] = d[i / 4][i % 4];
}
PLANT(fragments_wgmma_d, kThreads, sizeof(Operands), 1, 32 * kThreads);

// a is the number of the thread that holds it, or of the value within: gOut[row][k], through a b
// that has ones where k is the column.
template <bool kValues>
__global__ void fragments_wgmma_a(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Operands>();
  const int row = threadIdx.x / 2, first = threadIdx.x % 2 * 8;
  for (int k = first; k < first + 8; ++k) smem.b.set(row, k, row == k ? 1.0f : 0.0f);
  share(smem);
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const auto bits = [&](int value) {
      return __float_as_uint(static_cast<float>(kValues ? value : threadIdx.x)) >> 16;
    };
    a[i] = bits(2 * i) | bits(2 * i + 1) << 16;
  }
  Sums d;
  ptx::wgmma_fence();
  ptx::wgmma_rs<__nv_bfloat16, 64, ptx::Major::kK>(d, a, smem.b.descriptor(), false);
  finish(d);
  const int lane = threadIdx.x % 32, top = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < 8; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    gOut[(top + i / 2 % 2 * 8) * kOperandDepth + column] = d[i / 4][i % 4];
  }
}
PLANT(fragments_wgmma_a, kThreads, sizeof(Operands), 1, kOperandRows* kOperandDepth);

}  // namespace
}  // namespace planted
