"""Linear layers that add to a residual stream by ``csrc/linear_act.cpp``: one product of the tensor
cores whose epilogue drops and adds. The backward is a pass over dy, where it is dropped or wide,
and the products of :mod:`fused_lm.cuda.linear_act`.

Arguments are those of ``fused_lm.reference.linear_residual``; the dispatcher refuses what the
products can't do.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.cuda import extension


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
    return extension.op("linear_residual_fwd")(
        x, weight, bias, residual, rng, dropout_p, transposed
    )


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
    return extension.op("linear_residual_bwd")(
        dy, x, weight, bias, rng, dropout_p, transposed, needs_dx, needs_dbias, needs_dweight
    )
