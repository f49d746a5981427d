// LayerNorm and RMSNorm backward, with the residual stream's gradient and dropout in the same pass.
//
//   xhat      = (stream - mean) * rstd                      RMSNorm: mean = 0
//   g         = dy * weight
//   dresidual = dstream + rstd * (g - mean(g) - xhat * mean(g * xhat))  RMSNorm: without mean(g)
//   dx        = keep * dresidual
//   dweight   = sum over rows of dy * xhat;   dbias = sum over rows of dy
//
// norm_bwd: a grid of `strips` blocks that stay. Groups of 8 to 32 lanes or of whole warps walk
// rows strip * groups + group + k * strips * groups, the next one's loads under way. dweight and
// dbias stay in registers, are added over the groups at the end, and are a row of the partials.
// norm_bwd_looped: rows that no block's registers hold. Blocks walk 4 rows at a time twice, for
// the means and for the results, and add to their row of the partials in memory. All loads of a
// column vector of the 4 rows are under way before the first use.
// norm_bwd_finalize: 32 columns per block, 16 warps share the strips; y = 1 is the bias.
// No atomics, one order: results repeat bitwise on GPUs with as many SMs.
//
// Bytes, with sizes s of the elements, 0 for what is null, P = (dweight wanted) + (dbias wanted):
//   norm_bwd reads   N C (s_dy + s_stream + s_dstream + s_weight), and mean and rstd by every
//                    thread of a row (8 bytes, RMSNorm: 4, the same ones for all)
//   norm_bwd writes  N C (s_dx + s_dresidual) + 4 P strips C
//   looped   reads   N C (2 s_dy + 2 s_stream + s_dstream) + 2 T C s_weight + 4 P (T - strips) C,
//                    T = ceil(N / 4), and mean and rstd by every thread of a row
//   looped   writes  N C (s_dx + s_dresidual) + 4 P T C
//   finalize reads   4 P strips C, writes C (s_dweight + s_dbias)
//   dropout  reads   32 bytes of rng per thread and row (looped: 4 rows), the same ones for all
// FLOPs: 14 N C.
//
// Shared memory: NormBackwardShared has a pair of row sums per warp, twice, and the sums of the
// groups so far, element by thread, so that neighbours take neighbouring banks.
//
// | barrier       | who                    | why                                                  |
// | 1 + row       | warps of a row that    | sums are written before they are read; the next row  |
// |               | has several            | has the other slots, free since this row's barrier   |
// | __syncthreads | block; finalize: block | sums of the group before; of all warps               |
//
// Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
#include "kernels/layernorm.h"
#include "kernels/layernorm_bwd_row.h"
#include "kernels/layernorm_tuning.h"
#include "kernels/layernorm_types.h"
#include "ptx/launch.h"

namespace fused_lm {
namespace {

struct NormLoopedShared {
  float sums[2][2 * kNormLoopRows][kNormMaxWarps];
};
static_assert(sizeof(NormLoopedShared) == 2048);

constexpr int kFinalizeWarps = 16;
struct NormFinalizeShared {
  float sums[kFinalizeWarps][kWarpSize];
};
static_assert(sizeof(NormFinalizeShared) == 2048);

template <class TypeRow, int kVec, int kElements>
__global__ void __launch_bounds__(norm_backward_threads_per_sm(kElements, kVec), 1)
    norm_bwd(const NormBackwardParams params, int threads_per_row, float inverse_C) {
  const NormBackwardParams p = TypeRow::known(params);
  constexpr int kSlots = kElements / kVec;
  auto& shared = dynamic_smem<NormBackwardShared>();
  const RowThread at = row_thread(threads_per_row);
  const int groups = static_cast<int>(blockDim.x) / threads_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  RowTile tile{at,
               static_cast<int64_t>(blockIdx.x) * groups + at.row,
               groups,
               p.N,
               static_cast<int>(p.C),
               inverse_C};
  // Lanes of one warp loop together, until the first of its rows is beyond N.
  const int thread = static_cast<int>(threadIdx.x);
  const int row_in_warp = at.row - (thread - thread % kWarpSize) / threads_per_row;

  float dweight[kSlots][kVec] = {};
  float dbias[kSlots][kVec] = {};
  RowInputs<kSlots, kVec> next{};
  load_inputs(next, p, tile);
  int turn = 0;
  while (tile.first_row - row_in_warp < p.N) {
    // take over this row, and send for the next one
    float g[kSlots][kVec];
    float xhat[kSlots][kVec];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      widen_vector(g[i], next.dy[i][0], p.dy_dtype);
      widen_vector(xhat[i], next.stream[i][0], p.stream_dtype);
      normalise(xhat[i], next.mean, next.rstd);
    }
    const float rstd = next.rstd;
    RawVector<kVec> rDstream[kSlots][1];
    if (p.dstream != nullptr) {
      load_rows(rDstream, p.dstream, p.dstream_dtype, p.dstream_stride, tile);
    }
    const int64_t row = tile.first_row;
    tile.first_row += step;
    load_inputs(next, p, tile);

    // reduce
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      add_parameter_gradients(dweight[i], dbias[i], g[i], xhat[i]);
      const int column = at.column<kVec>(i);
      weigh(g[i], p, column, row < p.N && column < tile.C);
      add_row_sums(sums, g[i], xhat[i]);
    }
    row_sum(sums, shared.sums[turn], at);
    turn ^= 1;

    // store; the key is read here, since over the whole loop it would hold 19 registers
    const DropoutKey key = norm_dropout_key(p.dropout);
    float means[2];
    means_of(means, sums, inverse_C, p.mean != nullptr);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int column = at.column<kVec>(i);
      float dstream[kVec] = {};
      if (p.dstream != nullptr) widen_vector(dstream, rDstream[i][0], p.dstream_dtype);
      store_gradients(p, g[i], xhat[i], dstream, means, rstd, key, row, column,
                      row < p.N && column < tile.C);
    }
  }

  // partials
  if (!add_groups(dweight, dbias, shared, at)) return;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int column = at.column<kVec>(i);
    if (column >= tile.C) continue;
    const int64_t index = blockIdx.x * p.C + column;
    if (p.dweight_partial != nullptr) store_floats(p.dweight_partial, index, dweight[i]);
    if (p.dbias_partial != nullptr) store_floats(p.dbias_partial, index, dbias[i]);
  }
}

template <int kVec>
__global__ void __launch_bounds__(kNormLoopThreads, 1)
    norm_bwd_looped(const NormBackwardParams p, float inverse_C) {
  auto& shared = dynamic_smem<NormLoopedShared>();
  const RowThread at = row_thread(kNormLoopThreads);
  const int64_t first_column = at.thread * kVec;
  constexpr int64_t kStep = kNormLoopThreads * kVec;
  const int64_t strip = blockIdx.x;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kNormLoopRows;
  int turn = 0;
  for (int64_t row = strip * kNormLoopRows; row < p.N; row += row_step) {
    const LoopedRows rows = looped_rows(p, row);
    float sums[2 * kNormLoopRows] = {};
    looped_sums<kVec>(sums, p, rows, first_column, kStep);
    row_sum(sums, shared.sums[turn], at);
    turn ^= 1;
    float means[kNormLoopRows][2];
#pragma unroll
    for (int j = 0; j < kNormLoopRows; ++j) {
      means_of(means[j], sums + 2 * j, inverse_C, p.mean != nullptr);
    }
    const DropoutKey key = norm_dropout_key(p.dropout);
    const bool is_first = row == strip * kNormLoopRows;
    for (int64_t column = first_column; column < p.C; column += kStep) {
      const int64_t index = strip * p.C + column;
      float dweight[kVec] = {};
      float dbias[kVec] = {};
      if (!is_first) {
        if (p.dweight_partial != nullptr) load_floats(dweight, p.dweight_partial, index);
        if (p.dbias_partial != nullptr) load_floats(dbias, p.dbias_partial, index);
      }
      looped_gradients(p, means, key, rows, column, dweight, dbias);
      if (p.dweight_partial != nullptr) store_floats(p.dweight_partial, index, dweight);
      if (p.dbias_partial != nullptr) store_floats(p.dbias_partial, index, dbias);
    }
  }
}

__global__ void __launch_bounds__(kFinalizeWarps* kWarpSize)
    norm_bwd_finalize(const NormBackwardParams p, int64_t strips) {
  const bool is_bias = blockIdx.y == 1;
  void* out = is_bias ? p.dbias : p.dweight;
  const DType dtype = is_bias ? p.dbias_dtype : p.dweight_dtype;
  const float* partial = is_bias ? p.dbias_partial : p.dweight_partial;
  if (out == nullptr) return;
  auto& shared = dynamic_smem<NormFinalizeShared>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const bool ok = column < p.C;
  float total[1] = {};
#pragma unroll 8
  for (int64_t strip = warp; strip < strips; strip += kFinalizeWarps) {
    if (ok) total[0] += partial[strip * p.C + column];
  }
  shared.sums[warp][lane] = total[0];
  __syncthreads();
  if (warp != 0) return;
  total[0] = 0.0f;
#pragma unroll
  for (int w = 0; w < kFinalizeWarps; ++w) total[0] += shared.sums[w][lane];
  store_vector<false>(out, dtype, column, ok, total);
}

template <class TypeRow, int kVec, int kElements>
Status launch_rows(const NormBackwardParams& p, const NormTuning& tuning, int64_t strips,
                   Stream stream) {
  return launch(norm_bwd<TypeRow, kVec, kElements>,
                {dim3(static_cast<unsigned>(strips)), dim3(tuning.threads()),
                 sizeof(NormBackwardShared), stream},
                p, tuning.threads_per_row, inverse_of(p.C));
}

template <int kVec>
Status launch_looped(const NormBackwardParams& p, int64_t strips, Stream stream) {
  return launch(norm_bwd_looped<kVec>,
                {dim3(static_cast<unsigned>(strips)), dim3(kNormLoopThreads),
                 sizeof(NormLoopedShared), stream},
                p, inverse_of(p.C));
}

Status launch_gradients(const NormBackwardParams& p, const NormTuning& tuning, int width,
                        int64_t strips, Stream stream) {
  if (tuning.shape == NormShape::kLooped) {
    return width == 1 ? launch_looped<1>(p, strips, stream) : launch_looped<4>(p, strips, stream);
  }
  return with_type_row(p, width, [&](auto type_row, auto vector) {
    using TypeRow = decltype(type_row);
    constexpr int kVec = decltype(vector)::value;
    return tuning.shape == NormShape::kNarrow
               ? launch_rows<TypeRow, kVec, kNormNarrowElements>(p, tuning, strips, stream)
               : launch_rows<TypeRow, kVec, norm_backward_whole_elements(kVec)>(p, tuning, strips,
                                                                                stream);
  });
}

}  // namespace

int64_t norm_backward_strips(const NormBackwardParams& p, int multiprocessors) {
  const NormTuning tuning = norm_backward_tuning(p.C, vector_width(p));
  const int64_t resident = static_cast<int64_t>(multiprocessors) * tuning.blocks_per_sm;
  const int64_t needed = ceil_div(p.N, tuning.rows_per_block());
  return needed < resident ? needed : resident;
}

Status norm_backward(const NormBackwardParams& p, Stream stream) {
  const int width = vector_width(p);
  const NormTuning tuning = norm_backward_tuning(p.C, width);
  // No strip without rows: a looped one would leave its partials unwritten.
  const int64_t needed = ceil_div(p.N, tuning.rows_per_block());
  const int64_t strips = needed < p.strips ? needed : p.strips;
  if (p.N > 0) {
    const Status status = launch_gradients(p, tuning, width, strips, stream);
    if (status != kOk) return status;
  }
  if (p.dweight == nullptr && p.dbias == nullptr) return kOk;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.C, kWarpSize)), 2);
  return launch(norm_bwd_finalize,
                {grid, dim3(kFinalizeWarps * kWarpSize), sizeof(NormFinalizeShared), stream}, p,
                strips);
}

}  // namespace fused_lm
