"""``linear_residual`` by Triton: torch's product, and one pass that drops and adds. Backward a pass
over dy where it is dropped or wide, and the products of ``linear_act``.

Bytes of the pass, for b-byte elements: 3 b per element, 2 b backward. A product's own epilogue
would save 2 b of them, as it does in the CUDA kernels.

Arguments are those of ``fused_lm.reference.linear_residual``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lm.reference.philox import dropout_scale, dropout_threshold
from fused_lm.triton_kernels.interpreter import patch_interpreter
from fused_lm.triton_kernels.launch import device_of, rows_contiguous
from fused_lm.triton_kernels.layernorm_fwd import stream_tile
from fused_lm.triton_kernels.linear_act import linear_act_backward

patch_interpreter()

ROWS, COLUMNS = 4, 1024
"""Of a tile: 32 elements a thread."""


@triton.jit(do_not_specialize=["N", "threshold"])
def dropped_sum_kernel(
    z_ptr,  # [N, F]
    residual_ptr,  # [N, F] or None
    out_ptr,  # [N, F] contiguous
    rng_ptr,  # int64 [4] or None: no dropout
    N, F, z_stride, residual_stride, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = residual + dropout(z), in fp32 and rounded once."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.program_id(1) * BLOCK_C
    stream_tile(
        z_ptr, residual_ptr, out_ptr, rng_ptr, row, column, N, F, z_stride, residual_stride,
        threshold, keep_scale, ROWS, BLOCK_C,
    )  # fmt: skip


def linear_residual_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    transposed: bool,
) -> Tensor:
    """x [N, C], residual [N, F] -> y [N, F], dtype of the residual."""
    matrix = weight if transposed else weight.T
    z = torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    return _dropped_sum(z, residual, residual.dtype, rng, dropout_p)


def linear_residual_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias), empty where not needed; that of the residual is dy."""
    if rng is not None or dy.dtype != x.dtype:
        dy = _dropped_sum(dy, None, x.dtype, rng, dropout_p)
    return linear_act_backward(
        dy, x, weight, bias, dy, "none", transposed, needs_dx, needs_dbias, needs_dweight
    )


def _dropped_sum(
    z: Tensor, residual: Tensor | None, dtype: torch.dtype, rng: Tensor | None, dropout_p: float
) -> Tensor:
    z, residual = rows_contiguous(z), rows_contiguous(residual)
    out = z.new_empty(z.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    N, F = z.shape
    columns = min(COLUMNS, triton.next_power_of_2(max(F, 8)))
    stride = z.stride(0) if residual is None else residual.stride(0)
    with device_of(z):
        dropped_sum_kernel[(triton.cdiv(N, ROWS), triton.cdiv(F, columns))](
            z, residual, out, None if rng is None else rng.contiguous(), N, F, z.stride(0), stride,
            dropout_threshold(dropout_p), dropout_scale(dropout_p), ROWS, columns,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> forward and backward with meta tensors, for ``compile_check``."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "linear-residual-bf16-c768-dropout": lambda: _instantiate(bf16, bf16, 768, True),
        "linear-residual-bf16-c768-wide": lambda: _instantiate(bf16, fp32, 768, False),
    }


def _instantiate(dtype: torch.dtype, stream: torch.dtype, C: int, drops: bool) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias, residual = meta(16384, C), meta(C, C), meta(C), meta(16384, C, dtype=stream)
    rng = meta(4, dtype=torch.int64) if drops else None
    y = linear_residual_forward(x, weight, bias, residual, rng, 0.1, False)
    linear_residual_backward(y, x, weight, bias, rng, 0.1, False, True, True, True)
