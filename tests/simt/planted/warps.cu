// Mistakes with the operations of a warp.
#include "planted/case.h"

namespace planted {
namespace {

using namespace fused_lm;

template <bool kBug>
__global__ void shuffle_under_divergence(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  float value = gIn[lane];
  if (!kBug || lane < 16) {
    value += __shfl_xor_sync(~0u, value, 1);  // BUG(plain,race,asan): lanes of a warp part
  }
  value += __shfl_xor_sync(~0u, value, 2);
  gOut[lane] = value;
}
PLANT(shuffle_under_divergence, 32);

template <bool kBug>
__global__ void shuffle_after_an_exit(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  gOut[lane] = gIn[lane];
  if (kBug && lane == 31) return;
  // BUG(plain,race,asan): deadlock .*lanes 7fffffff: __shfl_sync at .*mask ffffffff
  gOut[lane] = __shfl_down_sync(~0u, gIn[lane], 1);
}
PLANT(shuffle_after_an_exit, 32);

template <bool kBug>
__global__ void shuffle_from_outside_the_mask(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  gOut[lane] = gIn[lane];
  if (lane >= 16) return;
  // BUG(plain,race,asan): reads lane (1[6-9]|2.|3.), which is not in mask 0000ffff
  gOut[lane] = __shfl_xor_sync(0xffffu, gIn[lane], kBug ? 16 : 8);
}
PLANT(shuffle_from_outside_the_mask, 32);

template <bool kBug>
__global__ void lane_outside_its_mask(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  const uint32_t mask = kBug ? 0x0000ffffu : ~0u;
  // BUG(plain,race,asan): lane (1[6-9]|2.|3.) calls, but is not in mask 0000ffff
  gOut[lane] = __shfl_sync(mask, gIn[lane], 0);
}
PLANT(lane_outside_its_mask, 32);

template <bool kBug>
__global__ void ballot_of_two_masks(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const uint32_t mask = kBug && lane < 16 ? 0x0001ffffu : half;
  // BUG(plain,race,asan): lanes of a warp part: warp vote
  gOut[lane] = static_cast<float>(__popc(__ballot_sync(mask, gIn[lane] > 8.0f)));
}
PLANT(ballot_of_two_masks, 32);

template <bool kBug>
__global__ void vote_that_half_the_lanes_skip(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  gOut[lane] = gIn[lane];
  if (kBug && lane % 2 == 0) return;
  // BUG(plain,race,asan): deadlock .*lanes aaaaaaaa: warp vote
  if (__any_sync(~0u, gIn[lane] > 3.0f)) gOut[lane] = -1.0f;
}
PLANT(vote_that_half_the_lanes_skip, 32);

template <bool kBug>
__global__ void syncwarp_against_shuffle(const float* gIn, float* gOut) {
  const int lane = threadIdx.x;
  float value = gIn[lane];
  if (kBug && lane < 8) __syncwarp();  // BUG(plain,race,asan): lanes of a warp part
  value += __shfl_xor_sync(~0u, value, 16);
  gOut[lane] = value;
}
PLANT(syncwarp_against_shuffle, 32);

// Right: the last warp of a block may be short, and its full mask means the lanes that exist.
template <bool kBug>
__global__ void shuffle_from_a_missing_lane(const float* gIn, float* gOut) {
  const int thread = threadIdx.x, lane = thread % 32;
  const int source = kBug ? 31 : lane % 16;
  // BUG(plain,race,asan): reads lane 31, which is not in mask 0000ffff
  gOut[thread] = __shfl_sync(~0u, gIn[thread], source);
}
PLANT(shuffle_from_a_missing_lane, 48);

}  // namespace
}  // namespace planted
