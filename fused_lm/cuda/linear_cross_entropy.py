"""A linear layer and its cross entropy: products, and between them the loss in place by
:mod:`.cross_entropy`.

In 16 bits the products are those of :mod:`.linear_act`, of widths that it takes; others are
torch's own. dweight adds up in fp32 in the epilogue of its product.

Arguments are those of ``fused_lm.reference.linear_cross_entropy``; fp64 is refused by the
dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.cuda.cross_entropy import cross_entropy_rows_in_place
from fused_lm.cuda.linear_act import linear_act_backward, linear_act_forward
from fused_lm.ops.linear_checks import CUDA_STEP
from fused_lm.reference import linear_cross_entropy as by_torch
from fused_lm.reference.cross_entropy import inverse_count, reduced, row_weights
from fused_lm.reference.linear_cross_entropy import (
    Needs,
    RowsInPlace,
    in_dtypes,
    needs_with_the_loss,
    rows_per_chunk,
)


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
    step = _step(ignore_index, label_smoothing, z_loss, softcap)
    needs = needs_with_the_loss(reduction, needs_dx, needs_dweight, needs_dbias)
    loss, dx, dweight, dbias = _walk(step, x, weight, bias, target, None, chunk_rows, needs)
    row_weight = loss.new_ones(())
    if reduction == "mean":
        row_weight = inverse_count(target, ignore_index).to(loss.dtype)
    return reduced(loss, target, ignore_index, reduction), row_weight, dx, dweight, dbias


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
    step = _step(ignore_index, label_smoothing, z_loss, softcap)
    needs = Needs(needs_dx, needs_dweight, needs_dbias)
    weights = row_weights(dloss, target, ignore_index, reduction)
    _, *gradients = _walk(step, x, weight, bias, target, weights, chunk_rows, needs)
    return in_dtypes(gradients, x, weight, bias)


def _step(ignore_index: int, label_smoothing: float, z_loss: float, softcap: float) -> RowsInPlace:
    options = (ignore_index, label_smoothing, z_loss, softcap)

    def step(
        logits: Tensor, target: Tensor, loss: Tensor, weights: Tensor | None, gradient: bool
    ) -> None:
        cross_entropy_rows_in_place(logits, target, loss, weights, *options, gradient)

    return step


def _walk(
    rows_in_place: RowsInPlace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: Tensor | None,
    chunk_rows: int | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fused_lm.reference.linear_cross_entropy.walk`, by our products where they exist."""
    (N, C), V = x.shape, weight.shape[0]
    if x.dtype == torch.float32 or C % CUDA_STEP or V % CUDA_STEP:
        return by_torch.walk(rows_in_place, x, weight, bias, target, weights, chunk_rows, needs)
    chunk = chunk_rows or rows_per_chunk(N, V, x.element_size())
    factor = weight.to(x.dtype)
    addend = None if bias is None else bias.to(x.dtype)
    loss = x.new_empty(N, dtype=torch.float32)
    dx = x.new_empty(x.shape if needs.dx else 0)
    dweight = x.new_zeros(weight.shape if needs.dweight else 0, dtype=torch.float32)
    dbias = x.new_zeros(V if needs.dbias else 0, dtype=torch.float32)
    no_pre = x.new_empty(0)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        logits, _ = linear_act_forward(x[rows], factor, addend, None, "none", False, False)
        part = None if weights is None else weights[rows]
        rows_in_place(logits, target[rows], loss[rows], part, any(needs))
        if needs.dx or needs.dweight:
            part_of_dx, _, _ = linear_act_backward(
                logits, x[rows], factor, None, no_pre, "none", False, needs.dx, False, False,
                dweight if needs.dweight else None,
            )  # fmt: skip
            if needs.dx:
                dx[rows] = part_of_dx
        if needs.dbias:
            dbias += logits.sum(0, dtype=torch.float32)
        del logits  # the next chunk's take its memory
    return loss, dx, dweight, dbias
