// Activations and their slopes on fp32 values: fused_lm/reference/activations.py in the
// instructions of a GPU.
//
// Three formulas cover them, with numbers that the whole grid shares, so that an epilogue has three
// paths and not one per activation:
//
//   Rectified   max(x, 0), or its square           relu, relu_squared     2 instructions
//   Sigmoidal   x s,  s = 1 / (1 + 2^-(x (a + b x^2)))  silu, gelu_tanh   5 and 2 MUFU
//   Gaussian    x Phi(x)                           gelu                   12 and 2 MUFU
//
// tanh(u) = 2 sigmoid(2 u) - 1, so (1 + tanh u) / 2 is a sigmoid: there is no cancellation where u
// is far below 0.
//
// A NaN stays one. Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Abramowitz, Stegun 1964,
// 7.1.26.
#pragma once

#include "kernels/gemm.h"
#include "ptx/math.h"
#include "ptx/reciprocal.h"

namespace fused_lm {

struct Rectified {
  bool squared;

  __device__ __forceinline__ float value(float x) const {
    const float positive = x < 0.0f ? 0.0f : x;  // fmaxf would lose a NaN
    return squared ? positive * positive : positive;
  }
  // 0 at the corner, as torch has it.
  __device__ __forceinline__ float slope(float x) const {
    const float above = squared ? 2.0f * x : 1.0f;
    return x > 0.0f ? above : 0.0f;
  }
};

// x sigmoid(linear x + cubic x^3).
struct Sigmoidal {
  float linear, cubic;
  static constexpr float kLog2OfE = 1.4426950408889634f;

  __device__ __forceinline__ float sigmoid(float x, float square) const {
    const float exponent = -kLog2OfE * x * fmaf(cubic, square, linear);
    return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(exponent));
  }
  __device__ __forceinline__ float value(float x) const { return x * sigmoid(x, x * x); }
  __device__ __forceinline__ float slope(float x) const {
    const float square = x * x, s = sigmoid(x, square);
    return fmaf(fmaf(-s, s, s), x * fmaf(3.0f * cubic, square, linear), s);
  }
};

// x Phi(x), Phi(-|x|) being t (a1 + t (a2 + ...)) e^(-x^2 / 2) / 2 with t = 1 / (1 + p |x| / sqrt
// 2): within 7.5e-8.
struct Gaussian {
  struct Normal {
    float below, density;  // Phi(x), and sqrt(2 pi) times its derivative
  };
  static __device__ __forceinline__ Normal normal(float x) {
    constexpr float kHalfLog2OfE = 0.72134752f, kStep = 0.3275911f * 0.70710678f;
    const float t = ptx::reciprocal_approx(fmaf(kStep, fabsf(x), 1.0f));
    const float density = ptx::exp2_approx(-kHalfLog2OfE * x * x);
    float tail = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
    tail = fmaf(t, tail, 0.5f * 1.421413741f);
    tail = fmaf(t, tail, 0.5f * -0.284496736f);
    tail = fmaf(t, tail, 0.5f * 0.254829592f) * t * density;
    return {x > 0.0f ? 1.0f - tail : tail, density};
  }
  __device__ __forceinline__ float value(float x) const { return x * normal(x).below; }
  __device__ __forceinline__ float slope(float x) const {
    constexpr float kPeak = 0.3989422804f;  // of the density
    const Normal at = normal(x);
    return fmaf(x * kPeak, at.density, at.below);
  }
};

// Calls body with the formula of an activation that is one; the whole grid asks for the same.
template <class Body>
__device__ __forceinline__ void with_activation(Activation activation, const Body& body) {
  constexpr float kTanhLinear = 2.0f * 0.79788456f, kTanhCubic = kTanhLinear * 0.044715f;
  if (activation == Activation::kGelu) {
    body(Gaussian{});
  } else if (activation == Activation::kSilu || activation == Activation::kGeluTanh) {
    const bool tanh = activation == Activation::kGeluTanh;
    body(Sigmoidal{tanh ? kTanhLinear : 1.0f, tanh ? kTanhCubic : 0.0f});
  } else {
    body(Rectified{activation == Activation::kReluSquared});
  }
}

}  // namespace fused_lm
