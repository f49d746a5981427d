// Which lane holds which element: kernels that show it for tests/test_simt_fragments.py to compare
// with CuTe's layouts.
#include "planted/case.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace planted {
namespace {

using namespace fused_lm;

// Four matrices of 8 rows, whose element i is the number i; row r has the address of lane r.
struct Rows {
  alignas(16) uint16_t element[32 * 8];
};

__device__ __forceinline__ void number_rows(Rows& smem, int lane) {
  for (int i = 0; i < 8; ++i) smem.element[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
}

// gOut[lane][2 * register + half]
__device__ __forceinline__ void write_halves(float* gOut, const uint32_t* r, int registers) {
  for (int i = 0; i < registers; ++i) {
    gOut[(threadIdx.x * registers + i) * 2] = static_cast<float>(r[i] & 0xffff);
    gOut[(threadIdx.x * registers + i) * 2 + 1] = static_cast<float>(r[i] >> 16);
  }
}

template <bool kTransposed>
__global__ void fragments_ldmatrix_x4(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Rows>();
  number_rows(smem, threadIdx.x);
  uint32_t r[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(r, &smem.element[8 * threadIdx.x]);
  } else {
    ptx::ldmatrix_x4(r, &smem.element[8 * threadIdx.x]);
  }
  write_halves(gOut, r, 4);
}
PLANT(fragments_ldmatrix_x4, 32, sizeof(Rows), 1, 256);

template <bool kTransposed>
__global__ void fragments_ldmatrix_x2(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Rows>();
  number_rows(smem, threadIdx.x);
  uint32_t r[2];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x2_trans(r, &smem.element[8 * threadIdx.x]);
  } else {
    ptx::ldmatrix_x2(r, &smem.element[8 * threadIdx.x]);
  }
  write_halves(gOut, r, 2);
}
PLANT(fragments_ldmatrix_x2, 32, sizeof(Rows), 1, 128);

// What lies where ldmatrix_x2 puts it, turned in registers: what ldmatrix_x2_trans reads.
template <bool kTurnedBack>
__global__ void fragments_movmatrix(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Rows>();
  number_rows(smem, threadIdx.x);
  uint32_t r[2];
  ptx::ldmatrix_x2(r, &smem.element[8 * threadIdx.x]);
  for (uint32_t& both : r) both = ptx::movmatrix_trans(both);
  if constexpr (kTurnedBack) {
    for (uint32_t& both : r) both = ptx::movmatrix_trans(both);
  }
  write_halves(gOut, r, 2);
}
PLANT(fragments_movmatrix, 32, sizeof(Rows), 1, 128);

// Register r, half h of lane l holds 8 l + 2 r + h; out comes what lies in shared memory.
template <bool kTransposed>
__global__ void fragments_stmatrix_x4(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Rows>();
  uint32_t r[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t low = 8 * threadIdx.x + 2 * i;
    r[i] = low | (low + 1) << 16;
  }
  if constexpr (kTransposed) {
    ptx::stmatrix_x4_trans(&smem.element[8 * threadIdx.x], r);
  } else {
    ptx::stmatrix_x4(&smem.element[8 * threadIdx.x], r);
  }
  __syncwarp();
  for (int i = 0; i < 8; ++i) gOut[8 * threadIdx.x + i] = smem.element[8 * threadIdx.x + i];
}
PLANT(fragments_stmatrix_x4, 32, sizeof(Rows), 1, 256);

// 256 products. In the i-th, value i % 8 of lane i / 8 of A is 1 and the rest 0; value v of lane l
// of B is 4 l + v; value v of lane l of C is 256 (4 l + v). gOut[i][lane][value of D].
template <bool kFloat16>
__global__ void fragments_mma(const float* gIn, float* gOut) {
  using Half = std::conditional_t<kFloat16, __half, __nv_bfloat16>;
  const auto bits = [](float x) {
    if constexpr (kFloat16) {
      return uint32_t{__half_raw(__float2half_rn(x)).x};
    } else {
      return uint32_t{__nv_bfloat16_raw(__float2bfloat16_rn(x)).x};
    }
  };
  const int lane = threadIdx.x;
  uint32_t b[2];
  for (int i = 0; i < 2; ++i) {
    const auto low = static_cast<float>(4 * lane + 2 * i);
    b[i] = bits(low) | bits(low + 1.0f) << 16;
  }
  for (int one = 0; one < 256; ++one) {
    uint32_t a[4] = {};
    if (one / 8 == lane) a[one % 8 / 2] = bits(1.0f) << 16 * (one % 2);
    float d[4];
    for (int v = 0; v < 4; ++v) d[v] = 256.0f * static_cast<float>(4 * lane + v);
    ptx::mma_m16n8k16(d, a, b, Half());
    for (int v = 0; v < 4; ++v) gOut[(one * 32 + lane) * 4 + v] = d[v];
  }
}
PLANT(fragments_mma, 32, 0, 1, 256 * 32 * 4);

}  // namespace
}  // namespace planted
