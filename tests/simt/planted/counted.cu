// Kernels without a mistake, whose two versions cost differently: what the counters must say is in
// tests/test_simt_harness.py, computed by hand.
#include "planted/case.h"
#include "ptx/barrier.h"
#include "ptx/cp_async.h"
#include "ptx/matrix.h"
#include "ptx/memory.h"
#include "ptx/mma.h"

namespace planted {
namespace {

using namespace fused_lm;

// 4 bytes per lane: in a row, or 8 floats (a sector) apart.
template <bool kStrided>
__global__ void count_words(const float* gIn, float* gOut) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  gOut[thread] = gIn[kStrided ? thread % 128 * 8 : thread];
}
PLANT(count_words, 64, 0, 2);

// 16 bytes per lane: whole sectors, or vectors of which every other one is left out.
template <bool kHoles>
__global__ void count_vectors(const float* gIn, float* gOut) {
  const int thread = threadIdx.x;
  const auto* gVectors = reinterpret_cast<const uint4*>(gIn);
  const uint4 v = ptx::load_streaming(&gVectors[kHoles ? 2 * thread : thread]);
  reinterpret_cast<uint4*>(gOut)[thread] = v;
}
PLANT(count_vectors, 64, 0, 1, 256);

// A row that begins 4 bytes after a sector's start touches one sector more.
template <bool kShifted>
__global__ void count_shifted_row(const float* gIn, float* gOut) {
  gOut[threadIdx.x] = gIn[threadIdx.x + (kShifted ? 1 : 0)];
}
PLANT(count_shifted_row, 32);

// All lanes ask for one word, or for two that are a sector apart.
template <bool kTwo>
__global__ void count_few_words(const float* gIn, float* gOut) {
  gOut[threadIdx.x] = gIn[kTwo ? threadIdx.x / 16 * 16 : 0];
}
PLANT(count_few_words, 32);

// Words whose address promises two bytes: no mistake, and four bytes each.
template <bool kOdd>
__global__ void count_loose_words(const float* gIn, float* gOut) {
  using Loose = uint32_t __attribute__((aligned(2), may_alias));
  const auto* gHalves = reinterpret_cast<const char*>(gIn) + (kOdd ? 2 : 0);
  gOut[threadIdx.x] =
      static_cast<float>(reinterpret_cast<const Loose*>(gHalves)[threadIdx.x] >> 16);
}
PLANT(count_loose_words, 32);

// An atomic reads and writes.
template <bool kTwice>
__global__ void count_atomics(const float* gIn, float* gOut) {
  gOut[threadIdx.x] = gIn[threadIdx.x];
  for (int i = 0; i < (kTwice ? 2 : 1); ++i) atomicAdd(&gOut[threadIdx.x], 1.0f);
}
PLANT(count_atomics, 32);

// Lane l stores to word l and loads word l of a transposed tile: column reads of a 32 x 32 tile hit
// one bank 32 times, unless rows are 33 words long.
template <bool kConflicts>
__global__ void count_transposed_tile(const float* gIn, float* gOut) {
  constexpr int kPitch = kConflicts ? 32 : 33;
  struct Tile {
    float value[32 * kPitch];
  };
  auto& smem = dynamic_smem<Tile>();
  const int lane = threadIdx.x;
  for (int row = 0; row < 32; ++row) smem.value[row * kPitch + lane] = gIn[row * 32 + lane];
  __syncwarp();
  float sum = 0.0f;
  for (int row = 0; row < 32; ++row) sum += smem.value[lane * kPitch + row];
  gOut[lane] = sum;
}
PLANT(count_transposed_tile, 32, 32 * 33 * sizeof(float));

struct Words {
  alignas(16) float value[256];
};

// One word for all lanes is one wavefront; words 2 apart share half of the banks.
template <bool kTwoWay>
__global__ void count_broadcast(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Words>();
  const int lane = threadIdx.x;
  smem.value[lane] = gIn[lane];
  smem.value[lane + 32] = gIn[lane + 32];
  __syncwarp();
  gOut[lane] = smem.value[kTwoWay ? 2 * lane : 5];
}
PLANT(count_broadcast, 32, sizeof(Words));

// 512 bytes of a warp are four wavefronts; vectors 32 bytes apart need eight.
template <bool kApart>
__global__ void count_shared_vectors(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Words>();
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) smem.value[i * 32 + lane] = gIn[i * 32 + lane];
  __syncwarp();
  const auto* sVectors = reinterpret_cast<const uint4*>(smem.value);
  const uint4 v = sVectors[kApart ? 2 * lane : lane];
  gOut[lane] = __uint_as_float(v.x);
}
PLANT(count_shared_vectors, 32, sizeof(Words));

// Rows of 128 bytes: 8 rows at one column lie in the same banks. With the column's bits 4..6
// exclusive-ored with the row's lowest three they lie in all of them.
template <bool kConflicts>
__global__ void count_ldmatrix(const float* gIn, float* gOut) {
  struct Tile {
    alignas(128) uint32_t word[32][32];
  };
  auto& smem = dynamic_smem<Tile>();
  const int lane = threadIdx.x;
  for (int row = 0; row < 32; ++row) smem.word[row][lane] = row;
  __syncwarp();
  uint32_t r[4];
  const int column = kConflicts ? 0 : lane % 8;
  ptx::ldmatrix_x4(r, &smem.word[lane][4 * column]);
  __syncwarp();
  ptx::stmatrix_x4(&smem.word[lane][4 * column], r);
  gOut[lane] = static_cast<float>(r[3]);
}
PLANT(count_ldmatrix, 32, 4096);

template <bool kTwice>
__global__ void count_mma(const float* gIn, float* gOut) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < (kTwice ? 6 : 3); ++i) ptx::mma_m16n8k16(d, a, b, __nv_bfloat16());
  gOut[threadIdx.x] = d[0];
}
PLANT(count_mma, 64);

// cp.async reads what it is told to, and zeros cost nothing.
template <bool kHalf>
__global__ void count_copies(const float* gIn, float* gOut) {
  auto& smem = dynamic_smem<Words>();
  float* mine = &smem.value[4 * threadIdx.x];
  ptx::cp_async_16(mine, &gIn[4 * threadIdx.x], kHalf ? 8 : 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  gOut[threadIdx.x] = mine[0];
}
PLANT(count_copies, 32, sizeof(Words));

// Warps that meet at barriers of their own while others are on their way, and nobody meets at the
// end: an access must be counted once, in every schedule.
template <bool kShuffled>
__global__ void count_in_parts(const float* gIn, float* gOut) {
  const int thread = threadIdx.x, half = thread / 64;
  float sum = 0.0f;
  for (int i = 0; i < 2 + half; ++i) {
    sum += gIn[128 * i + thread];
    ptx::named_barrier_sync(1 + half, 64);
    const uint32_t mask = thread % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    if (kShuffled) sum = __shfl_xor_sync(mask, sum, 1);
  }
  gOut[thread] = sum;
}
PLANT(count_in_parts, 128);

}  // namespace
}  // namespace planted
