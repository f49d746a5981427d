"""``linear_act`` by Triton: checks nothing, allocates, launches. ``ffn`` is built of its parts.

Arguments are those of ``fused_lm.reference.linear_act``; fp64 is refused by the dispatcher. What
has nothing to fuse (dx, and the plain second layer of an ``ffn``) is ``torch.mm``: cuBLAS has the
better GEMM. Weight gradients are ours: cuBLAS may add the parts of a split sum in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fused_lm.ops.checks import tf32_allowed
from fused_lm.reference.activations import GATES
from fused_lm.triton_kernels.column_sums import column_sums, sums_to
from fused_lm.triton_kernels.interpreter import interpreting, patch_interpreter
from fused_lm.triton_kernels.launch import device_of, multiprocessors, shared_memory_limit
from fused_lm.triton_kernels.linear_act_bwd import act_bwd_kernel, dgrad_act_kernel, wgrad_kernel
from fused_lm.triton_kernels.linear_act_fwd import linear_act_fwd_kernel
from fused_lm.triton_kernels.linear_act_tuning import (
    Tuning,
    act_bwd_tuning,
    gemm_tuning,
    run_length,
    wgrad_tuning,
)

patch_interpreter()

COMPILE_SMS = 132
"""Of an H200."""
MAX_STRIDE = 2**22
"""Elements: 256 of them, the longest side of a tile, are 2**30."""


def linear_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """x [N, C] -> y [N, F] and pre (empty unless ``keep_pre``)."""
    x, weight = addressable(x), addressable(weight)
    C, out = weight.shape if transposed else weight.T.shape
    gated = activation in GATES
    M, N = x.shape[0], out // 2 if gated else out
    y = x.new_empty(M, N)
    pre = x.new_empty((M, out) if keep_pre else (0,))
    if y.numel() == 0:
        return y, pre
    w_in, w_out = weight.stride() if transposed else weight.stride()[::-1]
    with device_of(x):
        tile = _tile("gated" if gated else "forward", x, M, N)
        linear_act_fwd_kernel[(tile.tiles(M, N),)](
            x, weight, None if bias is None else bias.contiguous(), y, pre if keep_pre else None,
            M, N, C, *x.stride(), w_out, w_in, GATES.get(activation, activation), gated,
            *product_options(x, C, tile), **tile.options(),
        )  # fmt: skip
    return y, pre


def linear_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias), empty where not needed; dweight is added into
    ``weight_grad`` if that is given, and then empty.
    """
    bias = bias if needs_dbias else None
    dpre, dbias = act_backward(dy, None if activation == "none" else pre, bias, activation)
    dx = input_gradient(dpre, weight, transposed) if needs_dx else x.new_empty(0)
    dweight = weight_gradient(dpre, x, weight, transposed, needs_dweight, weight_grad)
    return dx, dweight, dbias


def act_backward(
    dy: Tensor, pre: Tensor | None, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(dpre, dbias); without ``pre`` dpre is dy, and only the sums are made."""
    M, N = dy.shape
    gated = activation in GATES
    empty = dy.new_empty(0)
    if pre is None and bias is None:
        return dy, empty
    dpre = dy if pre is None else torch.empty_like(pre)
    width = dpre.shape[1]
    if dpre.numel() == 0:
        return dpre, empty if bias is None else torch.zeros_like(bias)
    rows, block_n, strips = act_bwd_tuning(M, N, _sms(dy.device))
    partial = None if bias is None else dy.new_empty((strips, width), dtype=torch.float32)
    with device_of(dy):
        act_bwd_kernel[(-(-N // block_n), strips)](
            dy, pre, None if pre is None else dpre, partial, M, N, *dy.stride(),
            GATES.get(activation, activation), gated, rows, block_n,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return dpre, sums_to(partial, bias, dy)


def input_gradient(dpre: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """dpre W [M, C]."""
    return torch.mm(dpre, weight.T if transposed else weight)


def weight_gradient(
    dpre: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    needed: bool,
    weight_grad: Tensor | None,
) -> Tensor:
    """dpre^T x as ``weight`` lies, or added into ``weight_grad`` and then empty."""
    if not needed and weight_grad is None:
        return weight.new_empty(0)
    add = weight_grad is not None
    out = weight_grad if weight_grad is not None else torch.empty_like(weight)
    x, dpre = addressable(x), addressable(dpre)
    left, right = (x, dpre) if transposed else (dpre, x)
    (K, M), N = left.shape, right.shape[1]
    if out.numel() and K == 0 and not add:
        out.zero_()
    if out.numel() and K:
        with device_of(x):
            _launch_wgrad(left, right, out, M, N, K, add)
    return weight.new_empty(0) if add else out


def _launch_wgrad(
    left: Tensor, right: Tensor, out: Tensor, M: int, N: int, K: int, add: bool
) -> None:
    limit, sms = _shared_memory(), _sms(left.device)
    tile, splits = wgrad_tuning(M, N, K, left.element_size(), limit, sms)
    per_split = -(-K // splits)
    per_split = -(-per_split // tile.block_k) * tile.block_k
    splits = -(-K // per_split)
    whole = splits == 1
    target = out if whole else out.new_empty((splits, M, N), dtype=torch.float32)
    out_strides = out.stride() if whole else (N, 1)
    wgrad_kernel[(tile.tiles(M, N), splits)](
        left, right, target, M, N, K, per_split, *left.stride(), *right.stride(), *out_strides,
        add and whole, *product_options(left, K, tile), **tile.options(),
    )  # fmt: skip
    if whole:
        return
    if out.is_contiguous():
        column_sums(target.view(splits, M * N), out, add)
    else:
        total = column_sums(target.view(splits, M * N), target.new_empty(M, N)).view(M, N)
        out.copy_(out + total if add else total)


def dgrad_act(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    activation: str,
    transposed: bool,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dpre, dbias) of a layer, from the gradient ``dy`` of the plain layer ``weight`` above it.

    ``hidden`` [M, N] is filled with act(pre) if given.
    """
    dy, weight = addressable(dy), addressable(weight)
    N, K = weight.shape if transposed else weight.T.shape
    M, gated = dy.shape[0], activation in GATES
    dpre = torch.empty_like(pre)
    if pre.numel() == 0:
        return dpre, dy.new_empty(0) if bias is None else torch.zeros_like(bias)
    w_n, w_k = weight.stride() if transposed else weight.stride()[::-1]
    with device_of(dy):
        tile = _tile("dgrad", dy, M, N)
        partial = None
        if bias is not None:
            partial = dy.new_empty((-(-M // tile.block_m), pre.shape[1]), dtype=torch.float32)
        dgrad_act_kernel[(tile.tiles(M, N),)](
            dy, weight, pre, dpre, hidden, partial, M, N, K, *dy.stride(), w_k, w_n,
            GATES.get(activation, activation), gated, *product_options(dy, K, tile),
            **tile.options(),
        )  # fmt: skip
        return dpre, sums_to(partial, bias, dy)


def _tile(kernel: str, like: Tensor, M: int, N: int) -> Tuning:
    limit, sms = _shared_memory(), _sms(like.device)
    return gemm_tuning(kernel, M, N, like.element_size(), limit, sms)


def _shared_memory() -> int:
    """Bytes one program can have on the target, or on every one where there is none."""
    if interpreting():
        return shared_memory_limit(0)
    return shared_memory_limit(triton.runtime.driver.active.get_current_target().arch)


def _sms(device: torch.device) -> int:
    """As ``multiprocessors``; a compilation without a GPU gets the tiles of a large one."""
    return COMPILE_SMS if device.type == "meta" else multiprocessors(device)


def addressable(t: Tensor) -> Tensor:
    """The matrix, or a contiguous copy where offsets inside a tile would not fit 32 bits."""
    return t if max(t.stride()) <= MAX_STRIDE else t.contiguous()


def product_options(like: Tensor, K: int, tile: Tuning) -> tuple[str, bool, int]:
    """(PRECISION, EVEN_K, RUN_K) of a product over K."""
    return precision(like), K % tile.block_k == 0, run_length(K, like.element_size())


def precision(like: Tensor) -> str:
    """How fp32 operands are multiplied: as torch's own linears do on this device."""
    return "tf32" if tf32_allowed(like) else "ieee"


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> forward and backward with meta tensors, for ``compile_check``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "linear-act-bf16-c768-swiglu-f1": lambda: _instantiate(bf16, 768, 2, "swiglu"),
        "linear-act-bf16-c768-gelu": lambda: _instantiate(bf16, 768, 3072, "gelu"),
        "linear-act-bf16-c1600-swiglu": lambda: _instantiate(bf16, 1600, 8192, "swiglu"),
        "linear-act-fp16-c768-gelu-tanh-conv1d": lambda: _instantiate(
            fp16, 768, 3072, "gelu_tanh", transposed=True
        ),
        "linear-act-fp32-c100-relu-squared": lambda: _instantiate(fp32, 100, 200, "relu_squared"),
        "linear-act-fp32-c1001-swiglu": lambda: _instantiate(fp32, 1001, 5504, "swiglu"),
    }


def _instantiate(
    dtype: torch.dtype, C: int, out: int, activation: str, transposed: bool = False
) -> None:
    def meta(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(16384, C)
    weight = meta(C, out) if transposed else meta(out, C)
    bias = meta(out)
    y, pre = linear_act_forward(x, weight, bias, None, activation, transposed, True)
    linear_act_backward(y, x, weight, bias, pre, activation, transposed, True, True, True)
