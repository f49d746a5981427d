"""The attention kernels that ``compile_check`` compiles: each feature once, where it weighs most.

Masked means a mask, a key mask and an fp32 bias with its gradient: the most shared memory per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm.triton_kernels import attention

B, H, HKV, T, S = 2, 4, 2, 1024, 1024


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> call of the host functions with meta tensors."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    window: dict[str, Any] = {"lower": -256, "upper": 0}
    return {
        "attention-fwd-fp16-d40": lambda: _forward(fp16, 40),
        "attention-fwd-fp16-d64-causal-dropout": lambda: _forward(fp16, 64, upper=0, dropout=0.1),
        "attention-fwd-bf16-d64-masked": lambda: _forward(bf16, 64, masked=True),
        "attention-fwd-bf16-d96-window-softcap": lambda: _forward(bf16, 96, softcap=30.0, **window),
        "attention-fwd-bf16-d128": lambda: _forward(bf16, 128),
        "attention-fwd-bf16-d128-causal": lambda: _forward(bf16, 128, upper=0),
        "attention-fwd-bf16-d128-masked": lambda: _forward(bf16, 128, masked=True),
        "attention-fwd-bf16-d256-causal": lambda: _forward(bf16, 256, upper=0),
        "attention-fwd-bf16-d512": lambda: _forward(bf16, 512),
        "attention-fwd-fp32-d64-causal": lambda: _forward(fp32, 64, upper=0),
        "attention-bwd-fp16-d64-masked-dropout": lambda: _backward(
            fp16, 64, masked=True, dropout=0.1
        ),
        "attention-bwd-bf16-d96-window-softcap": lambda: _backward(
            bf16, 96, softcap=30.0, **window
        ),
        "attention-bwd-bf16-d128-causal": lambda: _backward(bf16, 128, upper=0),
        "attention-bwd-bf16-d256": lambda: _backward(bf16, 256),
        "attention-bwd-fp32-d64": lambda: _backward(fp32, 64),
        "attention-weights-bf16-d64-masked-average": lambda: _weights(bf16, 64, masked=True),
    }


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _inputs(dtype: torch.dtype, D: int, masked: bool, dropout: float) -> list[Tensor | None]:
    """q, k, v, mask, key_mask, bias, rng."""
    optional: list[Tensor | None] = [None, None, None, None]
    if masked:
        optional[0] = _meta(B, 1, T, S, dtype=torch.bool)
        optional[1] = _meta(B, S, dtype=torch.bool)
        optional[2] = _meta(1, H, T, S, dtype=torch.float32)
    if dropout > 0:
        optional[3] = _meta(4, dtype=torch.int64)
    heads = (H, T), (HKV, S), (HKV, S)
    return [*(_meta(B, *size, D, dtype=dtype) for size in heads), *optional]


def _forward(
    dtype: torch.dtype, D: int, *, masked: bool = False, dropout: float = 0.0,
    lower: int | None = None, upper: int | None = None, softcap: float = 0.0,
) -> None:  # fmt: skip
    inputs: Any = _inputs(dtype, D, masked, dropout)
    attention.attention_forward(*inputs, lower, upper, D**-0.5, softcap, dropout)


def _backward(
    dtype: torch.dtype, D: int, *, masked: bool = False, dropout: float = 0.0,
    lower: int | None = None, upper: int | None = None, softcap: float = 0.0,
) -> None:  # fmt: skip
    inputs: Any = _inputs(dtype, D, masked, dropout)
    out, lse = _meta(B, H, T, D, dtype=dtype), _meta(B, H, T, dtype=torch.float32)
    attention.attention_backward(
        out,
        None,
        *inputs[:3],
        out,
        lse,
        *inputs[3:],
        lower,
        upper,
        D**-0.5,
        softcap,
        dropout,
        masked,
    )


def _weights(dtype: torch.dtype, D: int, *, masked: bool) -> None:
    q, k, _, *optional = _inputs(dtype, D, masked, 0.0)
    arguments: Any = (q, k, _meta(B, H, T, dtype=torch.float32), *optional)
    attention.attention_weights_forward(*arguments, None, None, D**-0.5, 0.0, 0.0, True)
