// Shapes of the norm kernels: pure functions of width and vector width, a reason per row.
//
// The cost model: a norm moves bytes and computes next to nothing, so a GPU needs its latency times
// its bandwidth in flight: 4.3 TB/s x 0.8 us / 132 SMs = 26 KB per SM, from loads that are all
// issued before the first use, and no spills.
// None of these rows has been measured on a GPU: they come from the model and from ptxas.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fused_lm {

enum class NormShape : int {
  kNarrow,  // few columns per thread; forward: several rows
  kWhole,   // a row in registers
  kLooped,  // a block walks a row
};

struct NormShapeSize {
  int elements;  // of a row, per thread, in vectors that lie threads_per_row vectors apart
  int rows;      // per thread at once
};

struct NormTuning {
  NormShape shape;
  NormShapeSize size;
  int threads_per_row;  // 8, 16, 32, then whole warps
  int groups;           // rows side by side in a block
  int blocks_per_sm;    // of a persistent grid; 0: the grid covers all rows
  const char* reason;

  constexpr int threads() const { return threads_per_row * groups; }
  constexpr int rows_per_block() const { return groups * size.rows; }
};

constexpr int kNormMinLanes = 8;  // x 16 bytes: a load takes whole 128-byte lines of every row
constexpr int kNormMaxWarps = 32;
constexpr int kNormLoopThreads = 512;
constexpr int kNormForwardThreads = 128;  // of a block whose rows need one warp at most
constexpr int64_t kNormNarrowC = 256;
constexpr int kNormNarrowElements = 8;

// The looped forward: two blocks per SM, so that one loads while the other one reduces, and as many
// vectors at once as 64 registers hold beside the dropout key, which takes 19. In flight per SM and
// tensor: 16 KB of 16 bits, 32 KB of fp32.
constexpr int kNormLoopForwardBlocks = 2;
constexpr int kNormLoopVectors = 2;

// The looped backward: one load of the weight and of its sums serves so many rows. In flight per SM
// of dy and stream: 32 KB of 16 bits, 64 KB of fp32; dstream adds half as much.
constexpr int kNormLoopRows = 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What means multiply by: no kernel divides.
constexpr float inverse_of(int64_t C) { return 1.0f / static_cast<float>(C); }

// Lanes of one warp, a power of two for the shuffles; then as few whole warps as hold the row.
constexpr int norm_threads_per_row(int64_t C, int elements) {
  const int64_t needed = ceil_div(C, elements);
  if (needed > kWarpSize) return static_cast<int>(ceil_div(needed, kWarpSize) * kWarpSize);
  int lanes = kNormMinLanes;
  while (lanes < needed) lanes *= 2;
  return lanes;
}

// Every thread has 64 bytes of each tensor in flight: 32 elements of 16 bits, 16 of fp32.
constexpr NormShapeSize norm_forward_size(NormShape shape, int vector_width) {
  if (shape == NormShape::kLooped) return {0, 1};
  if (shape == NormShape::kNarrow) return {kNormNarrowElements, vector_width == 8 ? 4 : 2};
  return {vector_width == 8 ? 32 : 16, 1};
}

// As many as have the registers for x, residual and values: 64 words with 16-bit vectors (96
// registers, 40 KB in flight per SM and tensor), 48 with fp32 (64 registers, 64 KB); scalars of 16
// bits take a word each and addresses of their own (80 registers).
constexpr int norm_forward_threads_per_sm(int vector_width) {
  return vector_width == 4 ? 1024 : vector_width == 8 ? 640 : 768;
}

// The widest row that a block holds: 20480, 16384 or 12288 with vectors of 8, 4 or 1.
constexpr int64_t norm_forward_whole_C(int vector_width) {
  return static_cast<int64_t>(norm_forward_threads_per_sm(vector_width)) *
         norm_forward_size(NormShape::kWhole, vector_width).elements;
}

constexpr NormTuning norm_forward_tuning(int64_t C, int vector_width) {
  if (C > norm_forward_whole_C(vector_width)) {
    return {NormShape::kLooped,
            norm_forward_size(NormShape::kLooped, vector_width),
            kNormLoopThreads,
            1,
            0,
            "no registers for a row: the L2 serves the later passes"};
  }
  const bool narrow = C <= kNormNarrowC;
  const NormShape shape = narrow ? NormShape::kNarrow : NormShape::kWhole;
  const NormShapeSize size = norm_forward_size(shape, vector_width);
  const int threads = norm_threads_per_row(C, size.elements);
  const int groups = threads > kWarpSize ? 1 : kNormForwardThreads / threads;
  return {shape,
          size,
          threads,
          groups,
          0,
          narrow ? "several rows per thread: as many bytes in flight as when a row is wide"
                 : "one warp per row where it holds it: no barrier; else as few warps as do"};
}

// Scalars have no registers for more: every word has an address of its own.
constexpr int norm_backward_whole_elements(int vector_width) {
  return vector_width == 8 ? 16 : vector_width == 4 ? 12 : 8;
}

// A thread holds xhat, g, two sums, dstream and the raw next row (dy, stream); the weight comes
// from the L1 for every row. The words that live at once, of the registers that so many threads
// leave (threads per SM come by 128s, 32 for each scheduler):
//   16-bit: 8 elements 16 + 16 + 4 + 8 = 44 of 96; 16 elements 32 + 32 + 8 + 16 = 88 of 168
//   fp32:   8 elements 16 + 16 + 8 + 16 = 56 of 128; 12 elements 24 + 24 + 12 + 24 = 84 of 168
// The next rows in flight per SM where rows fill so many threads: 20 KB and 24 KB; 32 KB and 36 KB;
// dstream adds half as much. Where they don't it is less: a bf16 row of C = 4096 is 256 threads,
// the registers have no room for a second block, and 16 KB are in flight, and 8 KB of dstream.
constexpr int norm_backward_threads_per_sm(int elements, int vector_width) {
  if (elements != kNormNarrowElements || vector_width == 1) return 384;
  return vector_width == 8 ? 640 : 512;
}

// Two blocks per SM where several groups share one. Each block writes a row of partials, so groups
// in a block save bytes: 16 strips C per strip, written and read.
constexpr int norm_backward_max_threads(int elements, int vector_width) {
  const int threads = norm_backward_threads_per_sm(elements, vector_width);
  return elements == kNormNarrowElements ? threads / 2 : threads;
}

// Rows that leave room for a second group in the block have at most so many threads.
constexpr int kNormBackwardSharedThreads = norm_backward_max_threads(kNormNarrowElements, 8) / 2;

constexpr NormTuning norm_backward_tuning(int64_t C, int vector_width) {
  const int narrow_threads = norm_backward_max_threads(kNormNarrowElements, vector_width);
  const int whole_elements = norm_backward_whole_elements(vector_width);
  const int whole_threads = norm_backward_max_threads(whole_elements, vector_width);
  const bool narrow = C <= kNormNarrowElements * narrow_threads;
  if (!narrow && C > whole_elements * whole_threads) {
    return {NormShape::kLooped,
            {0, kNormLoopRows},
            kNormLoopThreads,
            1,
            1,
            "no registers for a row: 4 rows are walked twice, the second time mostly in the L2"};
  }
  const int elements = narrow ? kNormNarrowElements : whole_elements;
  const int threads = norm_threads_per_row(C, elements);
  const int groups = narrow ? narrow_threads / threads : 1;
  const int blocks = norm_backward_threads_per_sm(elements, vector_width) / (threads * groups);
  return {narrow ? NormShape::kNarrow : NormShape::kWhole,
          {elements, 1},
          threads,
          groups,
          blocks,
          narrow ? "8 columns per thread: many warps per SM, and groups share a row of partials"
                 : "16 columns per thread: wider rows, at the price of half the warps per SM"};
}

}  // namespace fused_lm
