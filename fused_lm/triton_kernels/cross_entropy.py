"""Cross entropy by Triton: checks nothing, allocates, launches.

Arguments are those of ``fused_lm.reference.cross_entropy``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_lm.triton_kernels.cross_entropy_kernels import (
    cross_entropy_rows_kernel,
    cross_entropy_wide_kernel,
)
from fused_lm.triton_kernels.cross_entropy_scalars import (
    inverse_count_kernel,
    reduce_loss_kernel,
    scale_kernel,
)
from fused_lm.triton_kernels.cross_entropy_tuning import (
    REDUCE_ROWS,
    REDUCE_WARPS,
    scale_tuning,
    tuning,
)
from fused_lm.triton_kernels.interpreter import patch_interpreter
from fused_lm.triton_kernels.launch import device_of, rows_contiguous


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
    logits, target = rows_contiguous(logits), target.contiguous()
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    dlogits = None
    count = None
    if gradient == "with the loss":
        dlogits = logits.new_empty(logits.shape)
        count = inverse_count(target, ignore_index) if reduction == "mean" else None
    options = (ignore_index, label_smoothing, z_loss, softcap)
    launch(logits, target, loss, dlogits, None, count, *options)
    empty = logits.new_empty(0) if dlogits is None else dlogits
    return reduced(loss, target, ignore_index, reduction), empty


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
    logits = rows_contiguous(logits)
    dlogits = logits.new_empty(logits.shape)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _gradient_into(dlogits, dloss, logits, target, options, reduction)
    return dlogits


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
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _gradient_into(logits, dloss, logits, target, options, reduction)


def scale_in_place(dlogits: Tensor, dloss: Tensor) -> None:
    """dlogits *= dloss, one factor ([]) or one a row ([N]); 1 moves no bytes."""
    N, V = dlogits.shape
    if N == 0:
        return
    chosen = scale_tuning()
    patch_interpreter()
    with device_of(dlogits):
        scale_kernel[(N,)](
            dlogits, dloss, V, _stride(dloss), chosen.lanes, num_warps=chosen.num_warps
        )


def _gradient_into(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    options: tuple[int, float, float, float],
    reduction: str,
) -> None:
    target = target.contiguous()
    count = inverse_count(target, options[0]) if reduction == "mean" else None
    launch(logits, target, None, dlogits, dloss, count, *options)


def launch(
    logits: Tensor,
    target: Tensor,
    loss: Tensor | None,
    dlogits: Tensor | None,
    weights: Tensor | None,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Fills the loss fp32 [N] and dlogits [N, V], each if given; dlogits may be the logits.

    Args:
        logits, dlogits: Columns adjacent, rows any stride apart.
        weights: What a row's gradient is multiplied by, [N] or []; None: 1.
        count: fp32 [1], a factor of all rows; None: 1.
    """
    N, V = logits.shape
    if N == 0:
        return
    chosen = tuning(V, logits.element_size())
    dlogits_stride = 0 if dlogits is None else dlogits.stride(0)
    arguments = (
        logits, target, loss, dlogits, weights, count, N, V, logits.stride(0), dlogits_stride,
        0 if weights is None else _stride(weights), ignore_index, label_smoothing, z_loss, softcap,
        label_smoothing != 0.0, softcap != 0.0,
    )  # fmt: skip
    patch_interpreter()
    with device_of(logits):
        if chosen.rows:
            cross_entropy_rows_kernel[(-(-N // chosen.rows),)](
                *arguments, chosen.rows, chosen.block_v, num_warps=chosen.num_warps
            )
        else:
            same = dlogits is None or dlogits_stride == logits.stride(0)
            cross_entropy_wide_kernel[(N,)](
                *arguments, same, chosen.lanes, num_warps=chosen.num_warps
            )


def inverse_count(target: Tensor, ignore_index: int) -> Tensor:
    """fp32 [1]: 1 / number of rows that count, on the device."""
    found = target.new_empty(1, dtype=torch.float32)
    patch_interpreter()
    with device_of(target):
        inverse_count_kernel[(1,)](
            target, found, target.shape[0], ignore_index, REDUCE_ROWS, num_warps=REDUCE_WARPS
        )
    return found


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss per row, summed, or averaged over the rows that count (NaN if none does)."""
    if reduction == "none":
        return loss
    total = loss.new_empty(())
    patch_interpreter()
    with device_of(loss):
        reduce_loss_kernel[(1,)](
            loss, target, total, loss.shape[0], ignore_index, reduction == "mean", REDUCE_ROWS,
            num_warps=REDUCE_WARPS,
        )  # fmt: skip
    return total


def _stride(weights: Tensor) -> int:
    return weights.stride(0) if weights.dim() else 0


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> forward and backward with meta tensors, for ``compile_check``."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "crossentropy-bf16-v256": lambda: _instantiate(256, bf16),
        "crossentropy-fp32-v16384-smoothing": lambda: _instantiate(16384, fp32, smoothing=0.1),
        "crossentropy-fp32-v32000": lambda: _instantiate(32000, fp32),
        "crossentropy-bf16-v50257": lambda: _instantiate(50257, bf16),
        "crossentropy-bf16-v131072-softcap-smoothing": lambda: _instantiate(
            131072, bf16, smoothing=0.1, softcap=30.0
        ),
    }


def _instantiate(V: int, dtype: torch.dtype, smoothing: float = 0.0, softcap: float = 0.0) -> None:
    logits = torch.empty(64, V, dtype=dtype, device="meta")
    target = torch.empty(64, dtype=torch.int64, device="meta")
    options = (-100, smoothing, 1e-4, softcap, "mean")
    loss, dlogits = cross_entropy_forward(logits, target, *options, "with the loss")
    scale_in_place(dlogits, loss)
    cross_entropy_backward_in_place(loss, logits, target, *options)
