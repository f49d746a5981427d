"""A linear layer and its cross entropy without the whole logits: the walk over chunks of rows.

    logits_c = x_c W^T + bias            one chunk of rows at a time, always in the same memory
    loss_c, dlogits_c                    see ``reference/cross_entropy.py``; in place
    dx_c     = dlogits_c W                 in fp32 a part of the vocabulary at a time
    dW      += dlogits_c^T x_c           in fp32, whatever the dtype of the logits
    dbias   += sum over rows of dlogits_c

The products are torch's own; only the step in place differs between backends. Gradients are made
with the loss, for a dloss of 1 per counted row: 1 / count and dloss are applied to dx and dW in
the backward, so that an fp16 gradient doesn't vanish before the loss scale reaches it.

Sources: Liger Kernel (arXiv:2410.10989) for the chunks; the fp32 dW is ours to pay for, see
:func:`rows_per_chunk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lm.reference.cross_entropy import (
    cross_entropy_backward,
    inverse_count,
    reduced,
    row_losses,
    row_weights,
)

PREFERRED_ROWS = 4096
LEAST_ROWS = 2560
CHUNK_BYTES = 1 << 30
SUM_TERMS = 4096
"""Classes that one product sums for an fp32 dx.

cuBLAS sums a whole vocabulary one class after the other, and from the target on, which outweighs
the others, every addition rounds by a fraction of all of dx: sqrt(4096) roundings instead of
sqrt(50257), then 13 more. A part reads and writes dx, 8 bytes for 2 * 4096 FLOP: on an H200
(4.3 TB/s, 60 TFLOP/s in fp32) 1.4 % of the product's time.
"""


def rows_per_chunk(N: int, V: int, itemsize: int) -> int:
    """Rows of N that have their logits at the same time, by a formula.

    Every chunk reads and writes dW in fp32: 8 bytes for 6 * rows FLOP of products per element of
    W. On an H200 (4.3 TB/s, 790 TFLOP/s) that is 8 / 4.3e12 over 6 * rows / 790e12 = 245 / rows of
    the products' time, whatever V and C are: 6 % at 4096 rows, and under 10 % from 2450 on, in
    whole GEMM tiles 2560. So: 4096 rows, fewer where these logits would take more than 1 GiB, but
    2560 at least. What is left over is spread over the chunks, never a short chunk of its own; one
    chunk takes fewer than twice the rows that it should.
    """
    most = rows_at_once(V, itemsize)
    if most >= N:
        return max(1, N)
    chunks = min(_ceil_div(N, _wanted_rows(V, itemsize)), N // LEAST_ROWS)
    return _ceil_div(_ceil_div(N, chunks), 128) * 128


def rows_at_once(V: int, itemsize: int) -> int:
    """The most rows that make one chunk: two of fewer rows would each be shorter than the least."""
    return max(_wanted_rows(V, itemsize), 2 * LEAST_ROWS - 1)


def _wanted_rows(V: int, itemsize: int) -> int:
    return max(LEAST_ROWS, min(PREFERRED_ROWS, CHUNK_BYTES // (V * itemsize)))


class Needs(NamedTuple):
    """Which gradients a walk makes."""

    dx: bool
    dweight: bool
    dbias: bool


def needs_with_the_loss(reduction: str, dx: bool, dweight: bool, dbias: bool) -> Needs:
    """What a forward makes of the gradients that autograd wants: losses per row have another
    dloss each, which only the backward knows.
    """
    known = reduction != "none"
    return Needs(known and dx, known and dweight, known and dbias)


RowsInPlace = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], None]
"""(logits [n, V], target [n], loss [n], weights [n] or None, gradient): fills the loss and, if
asked for the gradient, overwrites the logits with it, each row times its weight.
"""


def walk(
    rows_in_place: RowsInPlace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: Tensor | None,
    chunk_rows: int | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], dx in the dtype of x, dweight and dbias in fp32); empty where not needed.

    Args:
        weights: [N], what each row's gradient is multiplied by; None: 1.
    """
    N, V = x.shape[0], weight.shape[0]
    chunk = chunk_rows or rows_per_chunk(N, V, x.element_size())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = weight.to(x.dtype)
    addend = None if bias is None else bias.to(x.dtype)
    loss = x.new_empty(N, dtype=wide)
    dx = x.new_empty(x.shape if needs.dx else 0)
    dweight = x.new_zeros(weight.shape if needs.dweight else 0, dtype=wide)
    dbias = x.new_zeros(V if needs.dbias else 0, dtype=wide)
    memory = x.new_empty(min(chunk, N), V)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        logits = memory[: rows.stop - start]
        if addend is None:
            torch.mm(x[rows], factor.t(), out=logits)
        else:
            torch.addmm(addend, x[rows], factor.t(), out=logits)
        part = None if weights is None else weights[rows]
        rows_in_place(logits, target[rows], loss[rows], part, any(needs))
        if needs.dx:
            _product_into(dx[rows], logits, factor)
        if needs.dweight:
            _add_product(dweight, logits.t(), x[rows])
        if needs.dbias:
            dbias += logits.sum(0, dtype=wide)
    return loss, dx, dweight, dbias


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; a sum that stays in fp32 between its parts is made in parts, :data:`SUM_TERMS`."""
    terms = SUM_TERMS if out.dtype == torch.float32 else b.shape[0]
    torch.mm(a[:, :terms], b[:terms], out=out)
    for start in range(terms, b.shape[0], terms):
        part = slice(start, start + terms)
        out.addmm_(a[:, part], b[part])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; 16-bit factors with an fp32 sum are an operator on CUDA only."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


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
    """(loss, row_weight [], dx, dweight fp32, dbias fp32); gradients empty where not needed.

    The gradients are those of a dloss of 1 per row; the whole one is ``row_weight * dloss`` times.
    """
    step = _rows_in_place(ignore_index, label_smoothing, z_loss, softcap)
    needs = needs_with_the_loss(reduction, needs_dx, needs_dweight, needs_dbias)
    loss, *gradients = walk(step, x, weight, bias, target, None, chunk_rows, needs)
    row_weight = loss.new_ones(())
    if reduction == "mean":
        row_weight = inverse_count(target, ignore_index).to(loss.dtype)
    dx, dweight, dbias = gradients
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
    step = _rows_in_place(ignore_index, label_smoothing, z_loss, softcap)
    needs = Needs(needs_dx, needs_dweight, needs_dbias)
    weights = row_weights(dloss, target, ignore_index, reduction)
    _, *gradients = walk(step, x, weight, bias, target, weights, chunk_rows, needs)
    return in_dtypes(gradients, x, weight, bias)


def in_dtypes(
    gradients: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The walk's gradients in the dtypes of what they belong to."""
    dx, dweight, dbias = gradients
    return dx, dweight.to(weight.dtype), dbias.to((weight if bias is None else bias).dtype)


def _rows_in_place(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> RowsInPlace:
    options = (ignore_index, label_smoothing, z_loss, softcap)

    def step(
        logits: Tensor, target: Tensor, loss: Tensor, weights: Tensor | None, gradient: bool
    ) -> None:
        loss.copy_(row_losses(logits, target, *options))
        if gradient:
            dloss = torch.ones_like(loss) if weights is None else weights
            logits.copy_(cross_entropy_backward(dloss, logits, target, *options, "none"))

    return step


def whole_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    *walk_arguments: object,
) -> tuple[Tensor, ...]:
    """:func:`linear_cross_entropy_forward` with whole logits, which every transform can follow."""
    logits = torch.nn.functional.linear(
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )
    loss = row_losses(logits, target, ignore_index, label_smoothing, z_loss, softcap)
    empty = loss.new_empty(0)
    return reduced(loss, target, ignore_index, reduction), empty, empty, empty, empty


def whole_backward(
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
    """:func:`linear_cross_entropy_backward` with whole logits, differentiable in every tensor."""
    factor = weight.to(x.dtype)
    addend = None if bias is None else bias.to(x.dtype)
    logits = torch.nn.functional.linear(x, factor, addend)
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    dlogits = cross_entropy_backward(dloss, logits, target, *options)
    dx = dlogits @ factor if needs_dx else x.new_empty(0)
    dweight = dlogits.t() @ x if needs_dweight else x.new_empty(0)
    dbias = dlogits.sum(0) if needs_dbias else x.new_empty(0)
    return in_dtypes([dx, dweight, dbias], x, weight, bias)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
