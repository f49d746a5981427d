// Shapes of the cross-entropy kernel: pure functions of vocabulary and element size, a reason per
// row.
//
// The cost model: loss and gradient read and write b bytes per logit, so that a multiprocessor of
// an H200 (4.3 TB/s over 132, 1.7 GHz) has 2b / 19 cycles for it: 0.21 at 16 bits. The two
// exponentials take 0.13 of them, so one row's arithmetic has to run beside another's loads, or
// beside its own. A thread has four vectors under way, 64 bytes, in 64 registers: 1024 threads per
// multiprocessor and 64 KB in flight, where latency times bandwidth is 26 KB. None of these rows
// has been measured on a GPU: they come from the model and from ptxas.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace fused_lm {

constexpr int kLossVectorBytes = 16;
constexpr int kLossBatch = 4;  // vectors that a thread has under way
constexpr int kLossMaxThreads = 1024;
constexpr int kLossMaxWarps = kLossMaxThreads / kWarpSize;
constexpr size_t kLossHeaderBytes = 3 * kLossMaxWarps * sizeof(float);  // CrossEntropyShared
constexpr size_t kReservedSharedBytes = 1024;                           // of every block, by CUDA

struct CrossEntropyTuning {
  int threads;       // of a block, which has one row
  int kept_vectors;  // of the row, in shared memory; what lies behind them is read twice
  const char* reason;

  constexpr size_t shared_bytes() const {
    return kLossHeaderBytes + static_cast<size_t>(kept_vectors) * kLossVectorBytes;
  }
};

// Of a block that may have shared_bytes; a multiprocessor has kReservedSharedBytes more.
constexpr CrossEntropyTuning cross_entropy_tuning(int64_t V, int element_bytes,
                                                  size_t shared_bytes) {
  const int64_t vectors = V * element_bytes / kLossVectorBytes;
  const size_t bytes = static_cast<size_t>(vectors) * kLossVectorBytes + kLossHeaderBytes;
  const int row = bytes <= shared_bytes ? static_cast<int>(vectors) : 0;
  if (bytes > shared_bytes) {
    const size_t most = (shared_bytes - kLossHeaderBytes) / kLossVectorBytes;
    return {1024, static_cast<int>(most),
            "longer than shared memory: the rest is read again, last read first, while the L2 has "
            "it; what several blocks have of it is up to 300 KB x 132 at 262144 of 16 bits"};
  }
  if (vectors <= 4 * kWarpSize) return {32, row, "a warp has all of the row under way at once"};
  if (vectors <= 512) return {128, row, "all of the row under way at once, eight rows at a time"};
  if (vectors <= 2048) return {256, row, "four rows at a time, two batches of each"};
  if (2 * (bytes + kReservedSharedBytes) <= shared_bytes + kReservedSharedBytes) {
    return {512, row, "two rows at a time: one loads while the other one stores"};
  }
  return {1024, row, "one row at a time: it is summed while it arrives, and stored as it is made"};
}

}  // namespace fused_lm
