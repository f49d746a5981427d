"""A linear layer and its cross entropy: torch's products, and between them the loss in place by
:mod:`.cross_entropy`.

Arguments are those of ``fused_lm.reference.linear_cross_entropy``; fp64 is refused by the
dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fused_lm.cuda.cross_entropy import cross_entropy_rows_in_place
from fused_lm.reference.cross_entropy import inverse_count, reduced, row_weights
from fused_lm.reference.linear_cross_entropy import (
    Needs,
    RowsInPlace,
    in_dtypes,
    needs_with_the_loss,
    walk,
)


def forward_by(
    rows_in_place: Callable[..., None],
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
    step = _step(rows_in_place, ignore_index, label_smoothing, z_loss, softcap)
    needs = needs_with_the_loss(reduction, needs_dx, needs_dweight, needs_dbias)
    loss, dx, dweight, dbias = walk(step, x, weight, bias, target, None, chunk_rows, needs)
    row_weight = loss.new_ones(())
    if reduction == "mean":
        row_weight = inverse_count(target, ignore_index).to(loss.dtype)
    return reduced(loss, target, ignore_index, reduction), row_weight, dx, dweight, dbias


def backward_by(
    rows_in_place: Callable[..., None],
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
    step = _step(rows_in_place, ignore_index, label_smoothing, z_loss, softcap)
    needs = Needs(needs_dx, needs_dweight, needs_dbias)
    weights = row_weights(dloss, target, ignore_index, reduction)
    _, *gradients = walk(step, x, weight, bias, target, weights, chunk_rows, needs)
    return in_dtypes(gradients, x, weight, bias)


def _step(rows_in_place: Callable[..., None], *options: float) -> RowsInPlace:
    def step(
        logits: Tensor, target: Tensor, loss: Tensor, weights: Tensor | None, gradient: bool
    ) -> None:
        rows_in_place(logits, target, loss, weights, *options, gradient)

    return step


linear_cross_entropy_forward = partial(forward_by, cross_entropy_rows_in_place)
linear_cross_entropy_backward = partial(backward_by, cross_entropy_rows_in_place)
