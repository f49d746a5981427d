"""A linear layer that adds to a residual stream, the derivation in plain PyTorch.

    y = residual + dropout(x W^T + b),  rounded once, to the dtype of the residual

Backward, with ``keep`` the factors of dropout, 0 or the scale of what is kept:

    dresidual = dy;   dz = keep * dy;   dx = dz W;   dW = dz^T x;   db = sum over rows of dz

Layouts of W as in :mod:`fused_lm.reference.linear_act`, the mask as in
:mod:`fused_lm.reference.philox` with batch and head 0. Source: Vaswani et al. 2017
(arXiv:1706.03762), 5.4.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.linear_act import linear_backward, wide
from fused_lm.reference.philox import scaled_keep


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
    z = wide(x) @ (wide(weight) if transposed else wide(weight).T)
    z = z if bias is None else z + wide(bias)
    return (dropped(z, rng, dropout_p) + wide(residual)).to(residual.dtype)


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
    dz = dropped(wide(dy), rng, dropout_p)
    return linear_backward(
        dz, x, weight, bias if needs_dbias else None, None, transposed, needs_dx, needs_dweight
    )


def dropped(z: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    """z [N, F] times the factors of dropout."""
    if rng is None:
        return z
    N, F = z.shape
    return z * scaled_keep(rng, 1, 1, N, F, dropout_p, z.dtype)[0, 0]
