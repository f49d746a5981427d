"""``ffn`` by Triton, of the kernels of ``linear_act``: forward one fused GEMM and a plain one,

    pre, hidden = linear_act(x, W1, b1);          y = hidden W2^T + b2

backward five launches of weight and two small ones:

    dpre, db1 partials, (hidden) = dgrad_act(dy, W2, pre);   dW2 = dy^T hidden;   db2 = sums of dy
    dx = dpre W1;   dW1 = dpre^T x;                          db1 = sums of the partials

Arguments are those of ``fused_lm.reference.ffn``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm.reference.ffn import kept
from fused_lm.triton_kernels.linear_act import (
    act_backward,
    dgrad_act,
    input_gradient,
    linear_act_forward,
    weight_gradient,
)


def ffn_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight_grad: Tensor | None,
    down_weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C2], pre [N, F] (gated: [N, 2F]) and hidden [N, F], empty if not kept."""
    hidden, pre = linear_act_forward(x, up_weight, up_bias, None, activation, transposed, keep_pre)
    matrix = down_weight if transposed else down_weight.T
    if down_bias is None:
        y = torch.mm(hidden, matrix)
    else:
        y = torch.addmm(down_bias.to(hidden.dtype), hidden, matrix)
    return y, pre, hidden if keep_hidden else x.new_empty(0)


def ffn_backward(
    dy: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    hidden: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbiases: bool,
    needs_dup: bool,
    needs_ddown: bool,
    up_weight_grad: Tensor | None = None,
    down_weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dup_weight, dup_bias, ddown_weight, ddown_bias), empty where not needed."""
    pre, hidden = kept(pre, hidden, activation)
    up_bias, down_bias = (up_bias, down_bias) if needs_dbiases else (None, None)
    again = None
    needs_hidden = needs_ddown or down_weight_grad is not None
    if hidden.dim() == 1 and needs_hidden:
        F = down_weight.shape[0 if transposed else 1]
        again = hidden = x.new_empty(x.shape[0], F)
    dpre, dup_bias = dgrad_act(dy, down_weight, pre, up_bias, activation, transposed, again)
    _, ddown_bias = act_backward(dy, None, down_bias, "none")
    ddown_weight = weight_gradient(
        dy, hidden, down_weight, transposed, needs_ddown, down_weight_grad
    )
    dx = input_gradient(dpre, up_weight, transposed) if needs_dx else x.new_empty(0)
    dup_weight = weight_gradient(dpre, x, up_weight, transposed, needs_dup, up_weight_grad)
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> forward and backward with meta tensors, for ``compile_check``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "ffn-bf16-c1024-gelu": lambda: _instantiate(bf16, 1024, 4096, "gelu", 4096),
        "ffn-fp16-c2048-geglu-tanh": lambda: _instantiate(fp16, 2048, 5632, "geglu_tanh", 11264),
        "ffn-fp32-c256-silu": lambda: _instantiate(fp32, 256, 1024, "silu", 1024),
        "ffn-fp32-c1024-swiglu": lambda: _instantiate(fp32, 1024, 2752, "swiglu", 5504),
    }


def _instantiate(dtype: torch.dtype, C: int, F: int, activation: str, out: int) -> None:
    def meta(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, up, down, up_bias, down_bias = meta(16384, C), meta(out, C), meta(C, F), meta(out), meta(C)
    y, pre, hidden = ffn_forward(
        x, up, up_bias, down, down_bias, None, None, activation, False, True, False
    )
    ffn_backward(
        y, x, up, up_bias, down, down_bias, pre, hidden, activation, False, True, True, True, True
    )
