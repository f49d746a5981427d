"""LayerNorm and RMSNorm by Triton: checks nothing, allocates, launches.

Arguments are those of ``fused_lm.reference.layernorm``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_lm.reference.philox import dropout_scale, dropout_threshold
from fused_lm.triton_kernels.column_sums import column_sums_tuning
from fused_lm.triton_kernels.interpreter import patch_interpreter
from fused_lm.triton_kernels.launch import device_of, multiprocessors, rows_contiguous
from fused_lm.triton_kernels.layernorm_bwd import (
    norm_bwd_finalize_kernel,
    norm_bwd_kernel,
    norm_bwd_row_means_kernel,
)
from fused_lm.triton_kernels.layernorm_fwd import norm_fwd_kernel, norm_fwd_wide_kernel
from fused_lm.triton_kernels.layernorm_tuning import (
    Tuning,
    backward_tuning,
    forward_tuning,
    row_means_tuning,
)


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), mean [N], rstd [N]."""
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    y, stream, rstd = _forward(
        x, residual, weight, bias, rng, mean, eps, dropout_p, out_dtype, residual_dtype
    )
    return y, stream, mean, rstd


def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    rng: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C], stream [N, C] (empty when it is x itself), rstd [N]."""
    return _forward(x, residual, weight, None, rng, None, eps, dropout_p, out_dtype, residual_dtype)


def layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dresidual, dweight, dbias); dresidual is empty where it would equal dx."""
    return _backward(
        dy, dstream, stream, weight, bias, mean, rstd, rng, dropout_p, x_dtype, residual_dtype
    )


def rms_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dresidual, dweight); dresidual is empty where it would equal dx."""
    return _backward(
        dy, dstream, stream, weight, None, None, rstd, rng, dropout_p, x_dtype, residual_dtype
    )[:3]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    mean: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stream, rstd), and ``mean`` filled; an RMSNorm where ``mean`` is None."""
    N, C = x.shape
    has_stream = residual is not None or rng is not None
    y = x.new_empty((N, C), dtype=out_dtype)
    stream = x.new_empty((N, C) if has_stream else (0,), dtype=residual_dtype)
    rstd = x.new_empty(N, dtype=torch.float32)
    if N == 0:
        return y, stream, rstd
    x, residual = rows_contiguous(x), rows_contiguous(residual)
    tuning = forward_tuning(C, _read_bytes(x, residual))
    arguments = (
        x, residual, _contiguous(weight), _contiguous(bias), _contiguous(rng), y,
        stream if has_stream else None, mean, rstd, N, C, x.stride(0), _row_stride(residual), eps,
        dropout_threshold(dropout_p), dropout_scale(dropout_p), mean is not None,
    )  # fmt: skip
    patch_interpreter()
    with device_of(x):
        if tuning.looped:
            norm_fwd_wide_kernel[(N,)](
                *arguments, tuning.block_c, num_warps=tuning.num_warps, enable_fp_fusion=True
            )
        else:
            norm_fwd_kernel[(_ceil_div(N, tuning.rows),)](
                *arguments,
                tuning.rows,
                tuning.block_c,
                num_warps=tuning.num_warps,
                enable_fp_fusion=True,
            )
    return y, stream, rstd


def _backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias); an RMSNorm where ``mean`` is None."""
    N, C = stream.shape
    separate = residual_dtype is not None and not (rng is None and residual_dtype == x_dtype)
    dx = stream.new_empty((N, C), dtype=x_dtype)
    dresidual = stream.new_empty((N, C) if separate else (0,), dtype=residual_dtype or x_dtype)
    if N == 0:
        return dx, dresidual, _zeros_like(weight, dx), _zeros_like(bias, dx)
    dy, dstream, stream = rows_contiguous(dy), rows_contiguous(dstream), rows_contiguous(stream)
    weight_data, mean, rstd = _contiguous(weight), _contiguous(mean), rstd.contiguous()
    tuning = backward_tuning(C, _read_bytes(dy, dstream, stream))
    column_blocks = _ceil_div(C, tuning.block_c)
    strips = _strips(N, column_blocks, tuning, stream.device)
    dweight_partial = None if weight is None else rstd.new_empty((strips, C))
    dbias_partial = None if bias is None else rstd.new_empty((strips, C))
    patch_interpreter()
    with device_of(dx):
        row_means = _row_means(dy, stream, weight_data, mean, rstd) if tuning.looped else None
        norm_bwd_kernel[(column_blocks, strips)](
            dy, dstream, stream, weight_data, mean, rstd, row_means, _contiguous(rng), dx,
            dresidual if separate else None, dweight_partial, dbias_partial, N, C, dy.stride(0),
            _row_stride(dstream), stream.stride(0), dropout_threshold(dropout_p),
            dropout_scale(dropout_p), mean is not None, tuning.rows, tuning.block_c, tuning.stages,
            num_warps=tuning.num_warps, maxnreg=tuning.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
        dweight, dbias = _finalize(dweight_partial, dbias_partial, weight, bias, dx)
    return dx, dresidual, dweight, dbias


def _row_means(
    dy: Tensor, stream: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> Tensor:
    """fp32 [2, N]: mean(g * xhat) and mean(g) of every row."""
    N, C = stream.shape
    row_means = rstd.new_empty((2, N))
    tuning = row_means_tuning()
    norm_bwd_row_means_kernel[(N,)](
        dy, stream, weight, mean, rstd, row_means, N, C, dy.stride(0), stream.stride(0),
        mean is not None, tuning.block_c, num_warps=tuning.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return row_means


def _finalize(
    dweight_partial: Tensor | None,
    dbias_partial: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums both partials [strips, C] into the parameters' dtypes by one launch."""
    dweight = like.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    dbias = like.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    partial = dbias_partial if dweight_partial is None else dweight_partial
    if partial is None:
        return dweight, dbias
    strips, C = partial.shape
    tuning = column_sums_tuning(strips)
    norm_bwd_finalize_kernel[(_ceil_div(C, tuning.block_c),)](
        dweight_partial,
        dbias_partial,
        None if weight is None else dweight,
        None if bias is None else dbias,
        strips,
        C,
        tuning.rows,
        tuning.block_c,
        num_warps=tuning.num_warps,
        enable_fp_fusion=True,
    )
    return dweight, dbias


def _strips(N: int, column_blocks: int, tuning: Tuning, device: torch.device) -> int:
    """Programs per column block: as many as the GPU holds at once, at least one tile each."""
    programs = multiprocessors(device) * tuning.programs_per_sm
    return min(_ceil_div(N, tuning.rows), max(1, programs // column_blocks))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _zeros_like(parameter: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if parameter is None else parameter.new_zeros(parameter.shape)


def _read_bytes(*tensors: Tensor | None) -> int:
    """Bytes per element, over all tensors that a kernel reads."""
    return sum(t.element_size() for t in tensors if t is not None)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> forward and backward with meta tensors, for ``compile_check``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "layernorm-fp16-c64": lambda: _instantiate(64, fp16, fp16),
        "layernorm-bf16-c768": lambda: _instantiate(768, bf16, bf16),
        "layernorm-bf16-c1600-residual-dropout": lambda: _instantiate(1600, bf16, bf16, bf16, 0.1),
        "layernorm-autocast-c1024-dropout": lambda: _instantiate(1024, bf16, fp32, fp32, 0.1),
        "layernorm-fp32-c2048-residual": lambda: _instantiate(2048, fp32, fp32, fp32),
        "layernorm-autocast-c8192-dropout": lambda: _instantiate(8192, bf16, fp32, fp32, 0.1),
        "layernorm-bf16-c16384": lambda: _instantiate(16384, bf16, bf16),
        "layernorm-fp32-c65536-dropout": lambda: _instantiate(65536, fp32, fp32, fp32, 0.1),
        "rmsnorm-bf16-c4096-residual": lambda: _instantiate(4096, bf16, bf16, bf16, rms=True),
    }


def _instantiate(
    C: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    rms: bool = False,
) -> None:
    N = 1024
    x = torch.empty(N, C, dtype=dtype, device="meta")
    residual = None if residual_dtype is None else x.to(residual_dtype)
    weight = torch.empty(C, dtype=weight_dtype, device="meta")
    rng = torch.empty(4, dtype=torch.int64, device="meta") if dropout_p > 0 else None
    mean = None if rms else x.new_empty(N, dtype=torch.float32)
    bias = None if rms else weight
    _, stream, rstd = _forward(
        x, residual, weight, bias, rng, mean, 1e-5, dropout_p, dtype, residual_dtype or dtype
    )
    dstream = None if residual is None else stream
    stream = x if residual is None and rng is None else stream
    _backward(x, dstream, stream, weight, bias, mean, rstd, rng, dropout_p, dtype, residual_dtype)
