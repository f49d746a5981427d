// What a thread of the cross-entropy kernels knows of its row: where vectors begin, the class that
// is right, and sums that many threads put together.
#pragma once

#include <cmath>

#include "common/vec.h"
#include "common/warp.h"
#include "kernels/cross_entropy.h"
#include "kernels/cross_entropy_tuning.h"
#include "ptx/math.h"

namespace fused_lm {

constexpr float kLog2E = 1.4426950408889634f;

template <DType kDType>
struct Logit {
  static constexpr int kBytes = size_of(kDType);
  static constexpr int kVec = kLossVectorBytes / kBytes;
};

// Calls body(const Integer*) with the targets in their own type.
template <class Body>
__device__ __forceinline__ void with_targets(const Targets& targets, const Body& body) {
  switch (targets.type) {
    case IntegerType::kInt64: return body(static_cast<const int64_t*>(targets.data));
    case IntegerType::kInt32: return body(static_cast<const int32_t*>(targets.data));
    case IntegerType::kInt16: return body(static_cast<const int16_t*>(targets.data));
    case IntegerType::kInt8: return body(static_cast<const int8_t*>(targets.data));
    case IntegerType::kUInt8: return body(static_cast<const uint8_t*>(targets.data));
  }
}

__device__ __forceinline__ int64_t target_of(const Targets& targets, int64_t row) {
  int64_t target = 0;
  with_targets(targets, [&](const auto* classes) { target = classes[row]; });
  return target;
}

// A row of V columns: `vectors` aligned vectors behind `head` columns, and `edges` columns in all
// before and behind them. Thread i has edge i, if there is one.
template <int kBytes>
struct RowSplit {
  static constexpr int kVec = kLossVectorBytes / kBytes;
  static_assert(2 * (kVec - 1) <= kWarpSize, "a thread of any block for every edge");
  int head;
  int vectors;
  int edges;

  __device__ __forceinline__ RowSplit(const void* row, int V) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kLossVectorBytes) / kBytes;
    head = min((kVec - past) % kVec, V);
    vectors = (V - head) / kVec;
    edges = V - vectors * kVec;
  }

  __device__ __forceinline__ int edge_column(int edge) const {
    return edge < head ? edge : edge + vectors * kVec;
  }
};

// 2^x of the unit that has it. The difference comes first: 1e4 * log2(e) would round it away.
__device__ __forceinline__ float exp_of(float difference) {
  return ptx::exp2_approx(difference * kLog2E);
}

// What exponents are taken from: -inf must not be subtracted from itself.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

// Over the scores that a thread has seen. A NaN is not in top, and stays in total.
struct RowSums {
  float top;
  float total;   // of exp(score - top)
  float scores;  // their sum

  template <int kVec>
  __device__ __forceinline__ void add(const float (&score)[kVec]) {
    const float before = top;
#pragma unroll
    for (int e = 0; e < kVec; ++e) top = fmaxf(top, score[e]);
    const float base = base_of(top);
    total *= exp_of(before - base);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      total += exp_of(score[e] - base);
      scores += score[e];
    }
  }
};

struct CrossEntropyShared {
  float top[kLossMaxWarps];
  float total[kLossMaxWarps];
  float scores[kLossMaxWarps];
};
static_assert(sizeof(CrossEntropyShared) == kLossHeaderBytes);
static_assert(kLossHeaderBytes % kLossVectorBytes == 0, "the row lies behind it");

// The sums of all lanes, in every lane.
__device__ __forceinline__ void merge_lanes(RowSums& sums) {
  float top = sums.top;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
  }
  float parts[2] = {sums.total * exp_of(sums.top - base_of(top)), sums.scores};
  lanes_sum(parts, kWarpSize);
  sums = {top, parts[0], parts[1]};
}

// The sums of all threads, in every thread; also a barrier.
__device__ __forceinline__ void merge_threads(RowSums& sums, CrossEntropyShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  merge_lanes(sums);
  if (lane == 0) {
    shared.top[warp] = sums.top;
    shared.total[warp] = sums.total;
    shared.scores[warp] = sums.scores;
  }
  __syncthreads();
  sums = {-INFINITY, 0.0f, 0.0f};
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) {
    sums = {shared.top[lane], shared.total[lane], shared.scores[lane]};
  }
  merge_lanes(sums);
}

// One element; narrower than a vector, and where none fits.
template <DType kDType>
__device__ __forceinline__ float load_one(const char* p) {
  RawVector<1> raw;
  float value[1];
  load_raw<Logit<kDType>::kBytes, LoadPolicy::kCached>(raw, p);
  widen<kDType>(value, raw);
  return value[0];
}

template <DType kDType>
__device__ __forceinline__ void store_one(char* p, float value) {
  RawVector<1> raw;
  const float values[1] = {value};
  narrow<kDType>(raw, values);
  store_raw<Logit<kDType>::kBytes>(p, raw);
}

}  // namespace fused_lm
