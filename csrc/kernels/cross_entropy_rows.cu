// Cross entropy with label smoothing, z-loss and softcap: loss and gradient, each logit read once
// and its gradient written once.
//
//   s    = softcap * tanh(logits / softcap)                           without softcap: the logits
//   m, l = max_j s_j, sum_j exp(s_j - m);   lse = m + log(l)
//   loss = (1 - eps) * (m - s_t) + eps * (m - mean(s)) + log(l) + z_loss * lse^2
//   dlogits_j = w * ((1 + 2 z_loss lse) * exp(s_j - m) / l - eps / V - (1 - eps) * [j = t])
//                 * (1 - (s_j / softcap)^2)
//
// m and log(l) stay apart: their sum has no digits left for a loss of 0.1 under logits of 1e4.
//
// Grid: a block per row. Vectors of 16 bytes begin where the row's address allows them, at another
// column in each row of an odd vocabulary. What is before and behind them, up to 14 columns, is one
// column each of the first threads, in a register. Pass one takes m, l and sum(s) of what arrives
// and keeps the words in shared memory; pass two makes the gradient of them. A thread keeps and
// reads its own words, four loads of which are under way at a time. cp.async would bring them
// without registers, but m needs them in registers at once, and 64 KB in flight are enough.
//
// Where the gradient begins at another address modulo 16 than the logits (logits that are a slice
// of wider rows), pass two goes by single columns, which lanes store side by side.
//
// Rows that don't count read no logits and write zeros. A target that is no class reads nothing out
// of bounds: loss and gradient of its row are NaN. In place works: pass two begins behind the
// barrier, and a block reads and writes its own row alone.
//
// cross_entropy_tuning.h: threads, and how much of a row is kept. R are the columns of a row that
// are not kept, all of them read a second time and the last read first, since the L2 has them.
//
// Bytes, with size b of a logit, t of a target and T threads; M the rows that count, where loss
// (l), weights (w) and a count (c) are 1 or 0:
//   reads   M (V + l) b + M R b (with a gradient) + N T t + M T (4 w + 4 c)
//   writes  N V b (with a gradient) + 4 N l
// All but the logits are the same ones for a block's threads. FLOPs: 5 V a row, and 7 V with a
// gradient; exponentials: V and a vector's worth, and V.
//
// Shared memory: CrossEntropyShared, a slot per warp for m, l and sum(s), then the kept words,
// whose number is the launch's: what build_tools/compiled.py says of this kernel is the slots
// alone.
//
// | barrier | who         | why                                                                 |
// | 0       | the threads | slots are read after they are written; pass two stores, in place or |
// |         | of the row  | by other threads' words, after pass one has read                    |
//
// Source: Milakov, Gimelshein 2018 (arXiv:1805.02867), the running maximum.
#include "kernels/cross_entropy.h"
#include "kernels/cross_entropy_row.h"
#include "kernels/cross_entropy_tuning.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

// The scores that are kept from becoming large: value becomes tanh(value / softcap).
struct Softcap {
  float bound;
  float inverse;

  template <bool kCapped, int kVec>
  __device__ __forceinline__ void turn(float (&value)[kVec]) const {
#pragma unroll
    for (int e = 0; e < kVec && kCapped; ++e) value[e] = tanhf(value[e] * inverse);
  }

  template <bool kCapped>
  __device__ __forceinline__ float score(float turned) const {
    return kCapped ? turned * bound : turned;
  }

  // ds / dlogit
  template <bool kCapped>
  __device__ __forceinline__ float slope(float turned) const {
    return kCapped ? 1.0f - turned * turned : 1.0f;
  }
};

// dlogits = weight * (factor * exp(s - top) - shift - [j = target] hit) * slope. The weight goes
// last: gradients of a loss of 1 that are scaled later are the same.
struct Gradient {
  float top;
  float factor;
  float shift;
  float hit;
  float weight;
  int target;
  Softcap cap;

  template <bool kCapped, int kVec>
  __device__ __forceinline__ void apply(float (&turned)[kVec], int column) const {
    float on_target[kVec] = {};
    const int place = target - column;
    if (place >= 0 && place < kVec) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) on_target[e] = e == place ? hit : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float p = factor * exp_of(cap.score<kCapped>(turned[e]) - top);
      turned[e] = weight * ((p - shift - on_target[e]) * cap.slope<kCapped>(turned[e]));
    }
  }
};

// A row's vectors: the first `kept` of them have a copy in shared memory.
struct RowVectors {
  const char* gFirst;
  char* sFirst;
  int count;
  int kept;
  int threads;
};

template <DType kDType, bool kCapped, int kVec>
__device__ __forceinline__ void widen_turned(float (&value)[kVec], const RawVector<kVec>& raw,
                                             const Softcap& cap) {
  widen<kDType>(value, raw);
  cap.turn<kCapped>(value);
}

template <bool kCapped, int kVec>
__device__ __forceinline__ void add_turned(RowSums& sums, float (&value)[kVec],
                                           const Softcap& cap) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) value[e] = cap.score<kCapped>(value[e]);
  sums.add(value);
}

// Pass one.
template <DType kDType, bool kCapped>
__device__ __forceinline__ void sum_vectors(RowSums& sums, const RowVectors& row,
                                            const Softcap& cap) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  constexpr int kVec = Logit<kDType>::kVec;
  for (int first = static_cast<int>(threadIdx.x); first < row.count;
       first += kLossBatch * row.threads) {
    RawVector<kVec> raw[kLossBatch];
#pragma unroll
    for (int j = 0; j < kLossBatch; ++j) {
      const int i = first + j * row.threads;
      const char* p = row.gFirst + static_cast<int64_t>(i) * kLossVectorBytes;
      if (i < row.count) load_raw<kBytes, LoadPolicy::kCached>(raw[j], p);
    }
#pragma unroll
    for (int j = 0; j < kLossBatch; ++j) {
      const int i = first + j * row.threads;
      if (i >= row.count) break;
      if (i < row.kept) store_raw<kBytes>(row.sFirst + i * kLossVectorBytes, raw[j]);
      float value[kVec];
      widen_turned<kDType, kCapped>(value, raw[j], cap);
      add_turned<kCapped>(sums, value, cap);
    }
  }
}

// Pass two, by whole vectors or by single columns of them: kVec elements at a time, the last first.
template <DType kDType, bool kCapped, int kVec>
__device__ __forceinline__ void store_gradient(char* gOut, const RowVectors& row, int column,
                                               const Gradient& gradient) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  constexpr int kStep = kVec * kBytes;
  constexpr int kPerVector = kLossVectorBytes / kStep;
  const int count = row.count * kPerVector;
  const int kept = row.kept * kPerVector;
  const int batch = kLossBatch * row.threads;
  for (int start = (count - 1) / batch * batch; start >= 0; start -= batch) {
    const int first = start + static_cast<int>(threadIdx.x);
    RawVector<kVec> raw[kLossBatch];
#pragma unroll
    for (int j = 0; j < kLossBatch; ++j) {
      const int i = first + j * row.threads;
      if (i < min(kept, count)) {
        load_raw<kBytes, LoadPolicy::kCached>(raw[j], row.sFirst + i * kStep);
      } else if (i < count) {
        const char* p = row.gFirst + static_cast<int64_t>(i) * kStep;
        load_raw<kBytes, LoadPolicy::kCached>(raw[j], p);
      }
    }
#pragma unroll
    for (int j = 0; j < kLossBatch; ++j) {
      const int i = first + j * row.threads;
      if (i >= count) break;
      float value[kVec];
      widen_turned<kDType, kCapped>(value, raw[j], gradient.cap);
      gradient.apply<kCapped>(value, column + i * kVec);
      narrow<kDType>(raw[j], value);
      store_raw<kBytes>(gOut + static_cast<int64_t>(i) * kStep, raw[j]);
    }
  }
}

// The gradient of a row that has none, or NaN.
template <DType kDType>
__device__ __forceinline__ void fill_row(char* gRow, int V, float value) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  constexpr int kVec = Logit<kDType>::kVec;
  const RowSplit<kBytes> split(gRow, V);
  const int thread = static_cast<int>(threadIdx.x);
  float values[kVec];
#pragma unroll
  for (int e = 0; e < kVec; ++e) values[e] = value;
  RawVector<kVec> raw;
  narrow<kDType>(raw, values);
  char* gFirst = gRow + split.head * kBytes;
  for (int i = thread; i < split.vectors; i += static_cast<int>(blockDim.x)) {
    store_raw<kBytes>(gFirst + static_cast<int64_t>(i) * kLossVectorBytes, raw);
  }
  if (thread < split.edges) {
    store_one<kDType>(address_of<kBytes>(gRow, split.edge_column(thread)), value);
  }
}

__device__ __forceinline__ float loss_of(const CrossEntropyParams& p, const RowSums& sums,
                                         float target_score) {
  const float log_total = logf(sums.total);
  const float lse = sums.top + log_total;
  float loss = sums.top - target_score;
  if (p.label_smoothing != 0.0f) {
    const float mean = sums.scores / static_cast<float>(p.V);
    loss = (1.0f - p.label_smoothing) * loss + p.label_smoothing * (sums.top - mean);
  }
  return loss + log_total + p.z_loss * lse * lse;
}

__device__ __forceinline__ Gradient gradient_of(const CrossEntropyParams& p, const RowSums& sums,
                                                int64_t row, int target, const Softcap& cap) {
  float weight = p.weight == nullptr ? 1.0f : p.weight[row * p.weight_stride];
  if (p.inverse_count != nullptr) weight *= *p.inverse_count;
  const float lse = sums.top + logf(sums.total);
  const float factor = (1.0f + 2.0f * p.z_loss * lse) / sums.total;
  const float shift = p.label_smoothing / static_cast<float>(p.V);
  return {sums.top, factor, shift, 1.0f - p.label_smoothing, weight, target, cap};
}

template <DType kDType, bool kCapped>
__global__ void __launch_bounds__(kLossMaxThreads, 1)
    cross_entropy_row(const CrossEntropyParams p, int kept) {
  constexpr int kBytes = Logit<kDType>::kBytes;
  constexpr int kVec = Logit<kDType>::kVec;
  auto& shared = dynamic_smem<CrossEntropyShared>();
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int V = static_cast<int>(p.V);
  char* gOut = address_of<kBytes>(p.dlogits, row * p.dlogits_stride);

  const int64_t target = target_of(p.targets, row);
  const bool counts = target != p.targets.ignore_index;
  if (!counts || target < 0 || target >= V) {
    const float value = counts ? NAN : 0.0f;
    if (p.loss != nullptr && thread == 0) p.loss[row] = value;
    if (p.dlogits != nullptr) fill_row<kDType>(gOut, V, value);
    return;
  }

  // load: the two that a thread has alone go first
  const Softcap cap{p.softcap, 1.0f / p.softcap};
  const char* gRow = address_of<kBytes>(p.logits, row * p.logits_stride);
  const RowSplit<kBytes> split(gRow, V);
  const bool at_edge = thread < split.edges;
  const int edge_column = split.edge_column(thread);
  float edge[1] = {};
  float right[1] = {};
  if (at_edge) edge[0] = load_one<kDType>(address_of<kBytes>(gRow, edge_column));
  if (p.loss != nullptr && thread == 0) {
    right[0] = load_one<kDType>(address_of<kBytes>(gRow, target));
  }
  const int threads = static_cast<int>(blockDim.x);
  const RowVectors vectors{gRow + split.head * kBytes, reinterpret_cast<char*>(&shared + 1),
                           split.vectors, kept, threads};

  // sums
  RowSums sums{-INFINITY, 0.0f, 0.0f};
  sum_vectors<kDType, kCapped>(sums, vectors, cap);
  if (at_edge) {
    cap.turn<kCapped>(edge);
    float score[1] = {edge[0]};
    add_turned<kCapped>(sums, score, cap);
  }
  merge_threads(sums, shared);

  // results
  if (p.loss != nullptr && thread == 0) {
    cap.turn<kCapped>(right);
    p.loss[row] = loss_of(p, sums, cap.score<kCapped>(right[0]));
  }
  if (p.dlogits == nullptr) return;
  const Gradient gradient = gradient_of(p, sums, row, static_cast<int>(target), cap);
  char* gOutVectors = gOut + split.head * kBytes;
  if (reinterpret_cast<uintptr_t>(gOutVectors) % kLossVectorBytes == 0) {
    store_gradient<kDType, kCapped, kVec>(gOutVectors, vectors, split.head, gradient);
  } else {
    store_gradient<kDType, kCapped, 1>(gOutVectors, vectors, split.head, gradient);
  }
  if (at_edge) {
    gradient.apply<kCapped>(edge, edge_column);
    store_one<kDType>(address_of<kBytes>(gOut, edge_column), edge[0]);
  }
}

template <DType kDType>
Status launch_rows(const CrossEntropyParams& p, const CrossEntropyTuning& tuning, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.N));
  const LaunchConfig config{grid, dim3(tuning.threads), tuning.shared_bytes(), stream};
  return p.softcap > 0.0f
             ? launch(cross_entropy_row<kDType, true>, config, p, tuning.kept_vectors)
             : launch(cross_entropy_row<kDType, false>, config, p, tuning.kept_vectors);
}

}  // namespace

Status cross_entropy_rows(const CrossEntropyParams& p, size_t shared_bytes, Stream stream) {
  if (p.N == 0) return kOk;
  const CrossEntropyTuning tuning = cross_entropy_tuning(p.V, size_of(p.dtype), shared_bytes);
  switch (p.dtype) {
    case DType::kFloat32: return launch_rows<DType::kFloat32>(p, tuning, stream);
    case DType::kFloat16: return launch_rows<DType::kFloat16>(p, tuning, stream);
    case DType::kBFloat16: break;
  }
  return launch_rows<DType::kBFloat16>(p, tuning, stream);
}

}  // namespace fused_lm
