// Mistakes with ldmatrix, stmatrix and mma.
#include "planted/case.h"
#include "ptx/barrier.h"
#include "ptx/matrix.h"
#include "ptx/mma.h"

namespace planted {
namespace {

using namespace fused_lm;

constexpr int kRows = 32, kPitch = 8;  // 16-bit elements: the rows of four matrices
struct Matrices {
  alignas(16) uint16_t row[kRows][kPitch];
  uint16_t more[kPitch];
};
constexpr size_t kMatrices = sizeof(Matrices);

__device__ __forceinline__ void fill_row(Matrices& smem, int row) {
  for (int i = 0; i < kPitch; ++i) smem.row[row][i] = static_cast<uint16_t>(row * kPitch + i);
}

__device__ __forceinline__ float total(const uint32_t (&r)[4]) {
  uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += (r[i] & 0xffff) + 3 * (r[i] >> 16);
  return static_cast<float>(sum);
}

template <bool kBug>
__global__ void ldmatrix_row_not_aligned(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  fill_row(smem, lane);
  if (lane < kPitch) smem.more[lane] = 0;
  __syncwarp();
  uint32_t r[4];
  // BUG(plain,race,asan): ldmatrix at .*: row address 0x\w+ is not 16-byte aligned
  ptx::ldmatrix_x4(r, &smem.row[lane][kBug ? 4 : 0]);
  gOut[lane] = total(r);
}
PLANT(ldmatrix_row_not_aligned, 32, kMatrices);

template <bool kBug>
__global__ void ldmatrix_row_outside(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  fill_row(smem, lane);
  __syncwarp();
  uint32_t r[4];
  const int row = kBug ? lane + 2 : lane;
  // BUG(plain,asan): ldmatrix at .*outside of the block's
  // BUG(race): (outside of the block's|uninitialised shared memory)
  ptx::ldmatrix_x4(r, smem.row[0] + row * kPitch);
  gOut[lane] = total(r);
}
PLANT(ldmatrix_row_outside, 32, kMatrices);

template <bool kBug>
__global__ void ldmatrix_row_not_written(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  if (!kBug || lane != 20) fill_row(smem, lane);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, smem.row[lane]);  // BUG(race): uninitialised shared memory: smem\+0x140
  gOut[lane] = total(r);
}
PLANT(ldmatrix_row_not_written, 32, kMatrices);

template <bool kBug>
__global__ void ldmatrix_before_the_barrier(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int thread = threadIdx.x;
  if (thread < 32) fill_row(smem, thread);
  if constexpr (!kBug) __syncthreads();
  uint32_t r[4];
  // BUG(race): (not ordered before it|uninitialised)
  ptx::ldmatrix_x4_trans(r, smem.row[thread % 32]);
  gOut[thread] = total(r);
}
PLANT(ldmatrix_before_the_barrier, 64, kMatrices);

template <bool kBug>
__global__ void ldmatrix_by_half_a_warp(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  fill_row(smem, lane);
  __syncwarp();
  uint32_t r[4] = {};
  // BUG(plain,race,asan): deadlock .*lanes ffff0000: ldmatrix at
  if (!kBug || lane >= 16) ptx::ldmatrix_x4(r, smem.row[lane]);
  gOut[lane] = total(r);
}
PLANT(ldmatrix_by_half_a_warp, 32, kMatrices);

template <bool kBug>
__global__ void stmatrix_before_the_readers_are_done(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  fill_row(smem, lane);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, smem.row[31 - lane]);
  if constexpr (!kBug) __syncwarp();
  ptx::stmatrix_x4(smem.row[lane], r);  // BUG(race): write to data whose read is not ordered
  __syncwarp();
  gOut[lane] = smem.row[lane][lane % kPitch];
}
PLANT(stmatrix_before_the_readers_are_done, 32, kMatrices);

template <bool kBug>
__global__ void stmatrix_read_too_early(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Matrices>();
  const int lane = threadIdx.x;
  const auto base = static_cast<uint32_t>(lane);
  const uint32_t r[4] = {base, base + 32, base + 64, base + 96};
  ptx::stmatrix_x4_trans(smem.row[lane], r);
  if constexpr (!kBug) __syncwarp();
  gOut[lane] = smem.row[31 - lane][0];  // BUG(race): not ordered before it
}
PLANT(stmatrix_read_too_early, 32, kMatrices);

template <bool kBug>
__global__ void mma_under_divergence(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  float d[4] = {};
  const uint32_t a[4] = {0x3f803f80u, 0x3f803f80u, 0, 0}, b[2] = {0x40004000u, 0};
  if (kBug && lane >= 8) {
    ptx::mma_m16n8k16(d, a, b, __nv_bfloat16());
  } else {
    ptx::mma_m16n8k16(d, a, b, __nv_bfloat16());  // BUG(plain,race,asan): lanes of a warp part
  }
  gOut[lane] = d[0] + d[3];
}
PLANT(mma_under_divergence, 32);

template <bool kBug>
__global__ void mma_by_some_lanes(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  float d[4] = {};
  const uint32_t a[4] = {0x3c003c00u, 0, 0, 0}, b[2] = {0x40004000u, 0};
  // BUG(plain,race,asan): deadlock .*lanes fffffff0: mma.sync at
  if (!kBug || lane >= 4) ptx::mma_m16n8k16(d, a, b, __half());
  gOut[lane] = d[0];
}
PLANT(mma_by_some_lanes, 32);

}  // namespace
}  // namespace planted
