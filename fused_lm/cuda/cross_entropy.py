"""Cross entropy by ``csrc/cross_entropy.cpp``, which allocates and launches.

Arguments are those of ``fused_lm.reference.cross_entropy``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.cuda import extension


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N] -> loss ([N], or [] reduced), dlogits [N, V] or empty."""
    return extension.op("cross_entropy_fwd")(
        logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction, gradient
    )


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """dlogits [N, V] of dloss ([N], or [] reduced)."""
    return extension.op("cross_entropy_bwd")(
        dloss, logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction
    )


def cross_entropy_backward_in_place(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> None:
    """:func:`cross_entropy_backward` into the memory of the logits."""
    extension.op("cross_entropy_bwd_in_place")(
        dloss, logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction
    )


def cross_entropy_rows_in_place(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradient: bool,
) -> None:
    """Fills the loss [N]; with ``gradient`` overwrites the logits with it, times the weights."""
    extension.op("cross_entropy_rows_in_place")(
        *(logits, target, loss, weights, ignore_index, label_smoothing, z_loss, softcap, gradient)
    )


def scale_in_place(dlogits: Tensor, dloss: Tensor) -> None:
    """dlogits *= dloss, one factor ([]) or one a row ([N]); 1 moves no bytes."""
    extension.op("cross_entropy_scale_in_place")(dlogits, dloss)
