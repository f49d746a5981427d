"""LayerNorm and RMSNorm by ``csrc/layernorm.cpp``, which allocates and launches.

Arguments are those of ``fused_lm.reference.layernorm``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.cuda import extension


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
    return extension.op("layer_norm_fwd")(
        x, residual, weight, bias, rng, eps, dropout_p, out_dtype, residual_dtype
    )


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
    return extension.op("layer_norm_bwd")(
        dy, dstream, stream, weight, bias, mean, rstd, rng, dropout_p, x_dtype, residual_dtype
    )


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
    return extension.op("rms_norm_fwd")(
        x, residual, weight, rng, eps, dropout_p, out_dtype, residual_dtype
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
    return extension.op("rms_norm_bwd")(
        dy, dstream, stream, weight, rstd, rng, dropout_p, x_dtype, residual_dtype
    )
