// The tile of the matrix products for every GPU since Ampere, and its reason.
//
// Per multiprocessor and clock an A100 has 2048 FLOP of its tensor cores, and 128 bytes of shared
// memory. A warp that multiplies [64, 16] by [16, 64] reads 4 KB for 64 clocks of the four tensor
// cores; of [64, 32] it would be 3 KB for 32. So a warp has 64 x 64, 128 sums per thread, and there
// are 8 warps on a multiprocessor at most, because a thread has 255 registers.
#pragma once

namespace fused_lm {

struct GemmTuningSm80 {
  int block_k;
  int stages;
  int blocks_per_sm;
  int group;  // M tiles side by side, for the L2
  const char* reason;
};

constexpr GemmTuningSm80 kGemmTuningSm80 = {
    32, 3, 2, 8,
    "48 KB: two blocks of 128 threads in the 100 KB of sm_86, 89 and 120 too, so that one "
    "multiplies where the other waits or stores; steps of 64 would be 96 KB"};

}  // namespace fused_lm
