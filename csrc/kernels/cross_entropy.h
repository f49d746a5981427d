// Cross entropy of rows of logits with label smoothing, z-loss and softcap: what a launch needs.
// No torch here: csrc/cross_entropy.cpp fills these in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace fused_lm {

// Columns and what a block takes at once behind them fit in 32 bits.
constexpr int64_t kMaxClasses = int64_t{1} << 30;

enum class IntegerType : int { kInt64, kInt32, kInt16, kInt8, kUInt8 };

// The class of each row.
struct Targets {
  const void* data;  // [N], adjacent
  IntegerType type;
  int64_t ignore_index;  // rows of this class don't count
};

struct CrossEntropyParams {
  const void* logits;          // [N, V]
  Targets targets;             // [N]
  float* loss;                 // [N] or null
  void* dlogits;               // [N, V] or null; may be the logits
  const float* weight;         // [N] or null: what the gradient of a row is multiplied by
  const float* inverse_count;  // [1] or null: a factor of all rows
  int64_t N;                   // below 2^31
  int64_t V;                   // below 2^31
  int64_t logits_stride;       // elements between rows; columns are adjacent
  int64_t dlogits_stride;      // the same
  int64_t weight_stride;       // 0: one weight for all rows
  float label_smoothing;
  float z_loss;
  float softcap;  // 0: none
  DType dtype;    // of logits and dlogits
};

// Loss and gradient of every row, each where it is wanted. A block may have so much shared memory.
Status cross_entropy_rows(const CrossEntropyParams& params, size_t shared_bytes, Stream stream);

// 1 / how many rows count, 1 where none does.
Status cross_entropy_inverse_count(const Targets& targets, int64_t N, float* inverse_count,
                                   Stream stream);

// The sum of the losses [N], or their mean over the rows that count: NaN where none does.
Status cross_entropy_reduce(const float* loss, const Targets& targets, int64_t N, bool mean,
                            float* total, Stream stream);

struct ScaleRowsParams {
  void* rows;             // [N, V], adjacent
  const float* factor;    // [N], or one for all rows
  int64_t N;              // below 2^31
  int64_t V;              // up to kMaxClasses
  int64_t factor_stride;  // 0: one for all rows
  DType dtype;
};

// rows *= factor; a factor of 1 moves no bytes.
Status scale_rows(const ScaleRowsParams& params, Stream stream);

}  // namespace fused_lm
