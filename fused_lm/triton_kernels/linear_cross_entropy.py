"""A linear layer and its cross entropy: torch's products, and Triton's loss in place between them.

Arguments are those of ``fused_lm.reference.linear_cross_entropy``; fp64 is refused by the
dispatcher.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.linear_cross_entropy import (
    Needs,
    RowsInPlace,
    in_dtypes,
    needs_with_the_loss,
    walk,
)
from fused_lm.triton_kernels import cross_entropy


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    chunk_rows: int | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, row_weight [], dx, dweight fp32, dbias fp32); gradients empty where not needed."""
    target = target.contiguous()
    step = _rows_in_place(ignore_index, label_smoothing, z_loss, softcap)
    needs = needs_with_the_loss(reduction, needs_dx, needs_dweight, needs_dbias)
    loss, *gradients = walk(step, x, weight, bias, target, None, chunk_rows, needs)
    row_weight = loss.new_ones(())
    if reduction == "mean":
        row_weight = cross_entropy.inverse_count(target, ignore_index).view(())
    dx, dweight, dbias = gradients
    total = cross_entropy.reduced(loss, target, ignore_index, reduction)
    return total, row_weight, dx, dweight, dbias


def linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    chunk_rows: int | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) in their inputs' dtypes, from logits computed anew, chunk by chunk."""
    target = target.contiguous()
    step = _rows_in_place(ignore_index, label_smoothing, z_loss, softcap)
    needs = Needs(needs_dx, needs_dweight, needs_dbias)
    weights = dloss
    if reduction == "mean":
        weights = dloss * cross_entropy.inverse_count(target, ignore_index).view(())
    weights = weights.expand(target.shape)
    _, *gradients = walk(step, x, weight, bias, target, weights, chunk_rows, needs)
    return in_dtypes(gradients, x, weight, bias)


def _rows_in_place(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> RowsInPlace:
    options = (ignore_index, label_smoothing, z_loss, softcap)

    def step(
        logits: Tensor, target: Tensor, loss: Tensor, weights: Tensor | None, gradient: bool
    ) -> None:
        dlogits = logits if gradient else None
        cross_entropy.launch(logits, target, loss, dlogits, weights, None, *options)

    return step
