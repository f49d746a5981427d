"""tanh for Triton kernels, in a form that its interpreter has too."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of fp32, within 2 ulp: Triton's libdevice has one, but its interpreter has no libdevice.

    Below 0.55 an odd minimax polynomial (1 - 2 / (e^2x + 1) would cancel there), above the formula.
    """
    square = x * x
    poly = -0.052671809 + square * 0.016437573
    poly = -0.33332947 + square * (0.13320725 + square * poly)
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * 1.4426950408889634)) + 1.0)
    large = tl.where(x < 0, -large, large)
    return tl.where(size < 0.55, x + x * (square * poly), large)
