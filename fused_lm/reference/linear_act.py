"""A linear layer and its activation, the derivation in plain PyTorch.

    pre = x W^T + b,  rounded to the dtype of x;    y = act(pre)

Backward:

    dpre = dy * act'(pre);   dx = dpre W;   dW = dpre^T x;   db = sum over rows of dpre

Because pre is rounded before the activation, a y that is computed again from it equals, to the bit,
the one that was dropped. Relu needs no pre: its output, which has the same sign and is its own
activation, takes its place. Absent tensors are empty, of one dim.

W is [out, in] as torch keeps it, or [in, out] (``transposed``) as GPT-2's Conv1D does. Products are
fp32 (fp64 for fp64). Sources: see :mod:`fused_lm.reference.activations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lm.reference.activations import GATES, activate, activate_backward


def keeps_pre(activation: str) -> bool:
    """Whether the backward needs the pre-activation, and not only the output."""
    return activation not in ("none", "relu")


def linear_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """x [N, C] -> y [N, F] and pre (empty unless ``keep_pre``)."""
    pre = project(x, weight, bias, transposed)
    y = activate(wide(pre), activation).to(x.dtype)
    return y, pre if keep_pre else x.new_empty(0)


def linear_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias), empty where not needed; dweight is added into
    ``weight_grad`` if that is given, and then empty.
    """
    dpre = wide(dy)
    if activation != "none":
        dpre = activate_backward(dpre, wide(pre), activation)
    bias = bias if needs_dbias else None
    return linear_backward(dpre, x, weight, bias, weight_grad, transposed, needs_dx, needs_dweight)


def linear_act_backward_of_input(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbias: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward as a function of the inputs alone, for second derivatives."""
    if activation != "none":
        pre = project(x, weight, bias, transposed)
    return linear_act_backward(
        dy, x, weight, bias, pre, activation, transposed, needs_dx, needs_dbias, needs_dweight
    )


def hidden_width(width: int, activation: str) -> int:
    """Outputs of a layer whose projection is ``width`` wide."""
    return width // 2 if activation in GATES else width


def project(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x [N, C] -> x W^T + b [N, F] by a wide product, in the dtype of x."""
    y = wide(x) @ (wide(weight) if transposed else wide(weight).T)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def linear_backward(
    dpre: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    transposed: bool,
    needs_dx: bool,
    needs_dweight: bool,
    dx_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of x W^T + b, from a wide dpre."""
    empty = dpre.new_empty(0, dtype=x.dtype)
    dx, dweight, dbias = empty, empty, empty
    if needs_dx:
        dx = (dpre @ (wide(weight).T if transposed else wide(weight))).to(dx_dtype or x.dtype)
    if needs_dweight or weight_grad is not None:
        total = wide(x).T @ dpre if transposed else dpre.T @ wide(x)
        if weight_grad is None:
            dweight = torch.empty_like(weight).copy_(total)  # as the weight lies
        else:
            weight_grad.copy_(weight_grad.to(total.dtype) + total)
    if bias is not None:
        dbias = dpre.sum(0).to(bias.dtype)
    return dx, dweight, dbias


def wide(t: Tensor) -> Tensor:
    """fp32, or fp64 for fp64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
