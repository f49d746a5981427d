"""Activations and their derivatives on fp32 tiles: the formulas of ``reference/activations.py``."""

import math

import triton
import triton.language as tl

from fused_lm.triton_kernels.tanh import tanh

HALF_ROOT = tl.constexpr(math.sqrt(0.5))
NORMAL_SCALE = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
TANH_SCALE = tl.constexpr(math.sqrt(2.0 / math.pi))
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activation_tile(x, ACTIVATION: tl.constexpr):
    """act(x); ACTIVATION is a plain one, or ``none``."""
    if ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == "relu_squared":
        y = tl.where(x <= 0.0, 0.0, x * x)
    elif ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh((x + x * x * x * TANH_CUBIC) * TANH_SCALE))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        y = x
    return y


@triton.jit
def derivative_tile(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu_squared":
        d = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        d = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * HALF_ROOT)) + x * tl.exp(-0.5 * x * x) * NORMAL_SCALE
    elif ACTIVATION == "gelu_tanh":
        t = tanh((x + x * x * x * TANH_CUBIC) * TANH_SCALE)
        inner = (x * x * (3.0 * TANH_CUBIC) + 1.0) * TANH_SCALE
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        d = tl.full(x.shape, 1.0, tl.float32)
    return d
