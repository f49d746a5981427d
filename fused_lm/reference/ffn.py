"""The feed-forward network of a transformer block, the derivation in plain PyTorch.

    pre = x W1^T + b1;   hidden = act(pre);   y = hidden W2^T + b2

Backward:

    dhidden = dy W2;     dW2 = dy^T hidden;   db2 = sum over rows of dy
    dpre = dhidden * act'(pre);   dx = dpre W1;   dW1 = dpre^T x;   db1 = sum over rows of dpre

``hidden`` may be dropped and made again from ``pre``; relu needs only ``hidden``. Layouts, rounding
and sources: see :mod:`fused_lm.reference.linear_act`.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.reference.activations import activate, activate_backward
from fused_lm.reference.linear_act import keeps_pre, linear_backward, project, wide


def ffn_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight_grad: Tensor | None,
    down_weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C] -> y [N, C2], pre [N, F] (gated: [N, 2F]) and hidden [N, F], empty if not kept."""
    pre = project(x, up_weight, up_bias, transposed)
    hidden = activate(wide(pre), activation).to(x.dtype)
    y = project(hidden, down_weight, down_bias, transposed)
    empty = x.new_empty(0)
    return y, pre if keep_pre else empty, hidden if keep_hidden else empty


def ffn_backward(
    dy: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    hidden: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbiases: bool,
    needs_dup: bool,
    needs_ddown: bool,
    up_weight_grad: Tensor | None = None,
    down_weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dup_weight, dup_bias, ddown_weight, ddown_bias), empty where not needed."""
    pre, hidden = kept(pre, hidden, activation)
    up_bias, down_bias = (up_bias, down_bias) if needs_dbiases else (None, None)
    if hidden.dim() == 1:
        hidden = activate(wide(pre), activation).to(x.dtype)
    dhidden, ddown_weight, ddown_bias = linear_backward(
        wide(dy), hidden, down_weight, down_bias, down_weight_grad, transposed, True,
        needs_ddown, wide(dy).dtype,
    )  # fmt: skip
    dpre = activate_backward(dhidden, wide(pre), activation)
    dx, dup_weight, dup_bias = linear_backward(
        dpre, x, up_weight, up_bias, up_weight_grad, transposed, needs_dx, needs_dup
    )
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias


def ffn_dpre(
    dy: Tensor, weight: Tensor, pre: Tensor, activation: str, transposed: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    """dpre [N, F], rounded, and its sums over rows (empty unless ``needs_dbias``), which are not:
    back through the second layer and the activation.
    """
    dhidden = wide(dy) @ (wide(weight).T if transposed else wide(weight))
    dpre = activate_backward(dhidden, wide(pre), activation)
    dbias = dpre.sum(0) if needs_dbias else dpre.new_empty(0)
    return dpre.to(dy.dtype), dbias.to(dy.dtype)


def ffn_backward_of_input(
    dy: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    hidden: Tensor,
    activation: str,
    transposed: bool,
    needs_dx: bool,
    needs_dbiases: bool,
    needs_dup: bool,
    needs_ddown: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward as a function of the inputs alone, for second derivatives."""
    pre = project(x, up_weight, up_bias, transposed)
    hidden = activate(wide(pre), activation).to(x.dtype)
    return ffn_backward(
        dy, x, up_weight, up_bias, down_weight, down_bias, pre, hidden, activation, transposed,
        needs_dx, needs_dbiases, needs_dup, needs_ddown,
    )  # fmt: skip


def kept(pre: Tensor, hidden: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(pre, hidden) as the backward reads them: one tensor can serve as both for relu."""
    return (pre, hidden) if keeps_pre(activation) else (hidden, hidden)
