// Matrix products whose epilogue is a layer: out = act(a b^T + bias), pre = a b^T + bias, or of
// gates and values out = act(gate) value; and what the kernels of all GPUs share.
#pragma once

#include <type_traits>

#include "common/types.h"

namespace fused_lm {

enum class Activation : int { kNone, kRelu, kReluSquared, kSilu, kGelu, kGeluTanh };

// A [rows, K] matrix of 16-bit elements. Memory holds it row by row, K adjacent; or `turned`, its
// rows adjacent: [K, rows].
struct GemmOperand {
  const uint16_t* data;  // 16-byte aligned
  int64_t stride;        // elements from one line of memory to the next, a multiple of 8
  bool turned;
};

// What sums are added to instead of stored: of any dtype, rounded once.
struct GemmTotal {
  void* data;            // [M, N], aligned to two elements; null: there is none
  const void* residual;  // [M, N] like it: data = residual + sums; null: data += sums
  int64_t stride;        // elements between rows, even
  DType dtype;
};

// What is done with the sums of a product [M, N].
//
// Gated, all that belongs to pre-activations is twice as wide, N gates and then N values: b, bias
// and pre of a forward, source, out and partial of a backward.
struct GemmLayer {
  const uint16_t* bias;  // [N], 4-byte aligned, or null
  Activation activation;
  bool gated;     // out = act(gate) value
  uint16_t* pre;  // [M, N] contiguous, 16-byte aligned, or null
  uint16_t* out;  // the same; not used with a total
  GemmTotal total;
  DropoutParams dropout;   // with a residual, of sums and bias: batch and head 0
  const uint16_t* source;  // [M, N] like pre: out = a b^T act'(source), its gradient; or null
  float* partial;          // with a source: [gemm_row_tiles(M), N], sums over each tile's rows
};

// Whole numbers of 8 elements wherever elements are adjacent: N, and K or the rows of an operand.
struct GemmParams {
  int M, N, K;    // all at least 1
  GemmOperand a;  // [M, K], turned only if b is
  GemmOperand b;  // [N, K], or gated [2 N, K]
  GemmLayer layer;
  float* parts;  // gemm_part_floats of gemm_tuning_sm90.h, 16-byte aligned
  int sms;       // of the GPU: blocks that run at once
};

// What is done with the sums of a call.
enum class GemmWork : int {
  kLinear,      // adds a bias, if anything
  kActivation,  // a bias and an activation, one or two outputs
  kGradient,    // adds the sums to what is in global memory
  kBackward,    // multiplies by an activation's slope
  kGated,
  kGatedBackward,
  kResidual,  // a bias, dropout, and what they are added to
};

constexpr GemmWork gemm_work(const GemmLayer& layer) {
  if (layer.total.residual != nullptr) return GemmWork::kResidual;
  if (layer.total.data != nullptr) return GemmWork::kGradient;
  if (layer.source != nullptr) return layer.gated ? GemmWork::kGatedBackward : GemmWork::kBackward;
  if (layer.gated) return GemmWork::kGated;
  const bool activates = layer.activation != Activation::kNone || layer.pre != nullptr;
  return activates ? GemmWork::kActivation : GemmWork::kLinear;
}

// Columns of a product whose layer has N.
constexpr int gemm_columns(int N, GemmWork work) { return work == GemmWork::kGated ? 2 * N : N; }

// Why no kernel is compiled for a call, if none is.
inline Status gemm_refusal(const GemmParams& p, GemmWork work) {
  const bool stores = work == GemmWork::kLinear;
  if (p.a.turned && !(p.b.turned && (stores || work == GemmWork::kGradient))) {
    return "only a weight's gradient has both operands turned";
  }
  if (!p.a.turned && work == GemmWork::kGradient) {
    return "only a weight's gradient is added to a total";
  }
  return kOk;
}

constexpr int kGemmStep = 8;  // elements of 16 bytes, which TMA counts in
constexpr int kGemmBlockM = 128;

constexpr int gemm_row_tiles(int M) {
  return static_cast<int>((int64_t{M} + kGemmBlockM - 1) / kGemmBlockM);
}

// On every GPU since Ampere; parts are not used.
Status gemm_sm80_bf16(const GemmParams& params, Stream stream);
Status gemm_sm80_fp16(const GemmParams& params, Stream stream);

// Hopper's. Weak: a build for other GPUs alone has none.
__attribute__((weak)) Status gemm_sm90_bf16(const GemmParams& params, Stream stream);
__attribute__((weak)) Status gemm_sm90_fp16(const GemmParams& params, Stream stream);

namespace gemm {

// Which operands are turned: those of a forward; b, where a gradient goes back through a weight;
// both, where two activations give a weight's gradient.
enum class Layout : int { kNoneTurned, kRightTurned, kBothTurned };

}  // namespace gemm

}  // namespace fused_lm
