"""Repairs Triton's CPU interpreter for bfloat16, so that kernels can be proven without a GPU.

With ``TRITON_INTERPRET=1`` Triton 3.6 and 3.7 keep bf16 values as their bits in uint16 arrays. Two
operations then give wrong numbers: ``tl.dot`` multiplies the bits as integers, and the conversion
from fp32 truncates where a GPU rounds to nearest even. ``patch_interpreter`` replaces both, and
widens 16-bit operands to fp32 before the product, which is exact and lets numpy use BLAS.

Other arithmetic on bf16 works on bits too and is not repaired: kernels widen to fp32 right after a
load. ``upstream_is_fixed`` says when Triton needs none of this any more.

Triton 3.6 converts arrays of one element by ``int()``, which numpy 2.4 refuses: loop bounds are
repaired. It also patches ``triton.language`` anew for every call of a jit helper, a third of the
run time, though the launch around it has done so already: here a helper's module is patched once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_patched: dict[str, Any] = {}
"""The replaced methods of ``InterpreterBuilder`` by name; empty until :func:`patch_interpreter`."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` at triton's import)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def patch_interpreter() -> None:
    """Repairs the interpreter in this process; does nothing outside it or when already done."""
    if _patched or not interpreting():
        return
    import triton.language as tl
    from triton.runtime import interpreter as upstream
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar not in (tl.bfloat16, tl.float16):
            return original_dot(self, a, b, d, *options)
        product = np.matmul(_to_fp32(a, tl), _to_fp32(b, tl), dtype=np.float32)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(fp32_to_bf16_bits(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(bf16_bits_to_fp32(src.data), tl.float32)
        return original_cast(self, src, dst_type)

    modules: set[int] = set()

    def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in modules:
            modules.add(id(self.fn.__globals__))
            upstream._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        original_patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    original_patch_tensor = upstream._patch_lang_tensor
    upstream._patch_lang_tensor = patch_tensor
    _patched.update(create_dot=original_dot, cast_impl=original_cast)
    upstream.InterpretedFunction.__call__ = call_helper
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def upstream_is_fixed() -> bool:
    """Self-test: whether Triton's own bf16 ``tl.dot`` and rounding are right without the patch."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder = InterpreterBuilder()
    create_dot = _patched.get("create_dot", InterpreterBuilder.create_dot)
    cast_impl = _patched.get("cast_impl", InterpreterBuilder.cast_impl)
    value = TensorHandle(fp32_to_bf16_bits(np.full((1, 1), 1.5, np.float32)), tl.bfloat16)
    zero = TensorHandle(np.zeros((1, 1), np.float32), tl.float32)
    product = create_dot(builder, value, value, zero, None, 0).data
    rounds_up = TensorHandle(np.full((1, 1), 1 + 3 / 512, np.float32), tl.float32)
    rounded = cast_impl(builder, rounds_up, tl.bfloat16).data
    return bool(product[0, 0] == 2.25) and bool(bf16_bits_to_fp32(rounded)[0, 0] == 1 + 1 / 128)


def fp32_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 of the same shape, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Just under half of the dropped part, plus the last kept bit: ties carry where that is odd.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def bf16_bits_to_fp32(bits: np.ndarray) -> np.ndarray:
    """uint16 -> fp32 of the same shape, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_fp32(handle: Any, tl: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return bf16_bits_to_fp32(handle.data)
    return handle.data.astype(np.float32)
