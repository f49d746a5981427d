"""``ffn`` by ``csrc/linear_act.cpp`` and ``csrc/ffn.cpp``: forward two products of the tensor
cores,

    pre, hidden = linear_act(x, W1, b1);          y = hidden W2^T + b2

backward four and two small launches:

    dpre, db1 = back through W2 and the activation;   dW2 = dy^T hidden;   db2 = sums of dy
    dx = dpre W1;                                     dW1 = dpre^T x

Arguments are those of ``fused_lm.reference.ffn``; the dispatcher refuses what :mod:`.linear_act`
can't do. Hidden activations that were dropped are made again by PyTorch, elementwise and rounded
once, for dW2 alone: its last bits may be others then.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.cuda import extension
from fused_lm.cuda.linear_act import linear_act_backward, linear_act_forward
from fused_lm.reference.activations import GATES, activate
from fused_lm.reference.ffn import kept
from fused_lm.reference.linear_act import wide


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
    hidden, pre = linear_act_forward(x, up_weight, up_bias, None, activation, transposed, keep_pre)
    y, _ = linear_act_forward(hidden, down_weight, down_bias, None, "none", transposed, False)
    return y, pre, hidden if keep_hidden else x.new_empty(0)


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
    needs_hidden = needs_ddown or down_weight_grad is not None
    if needs_hidden and hidden.numel() == 0:
        hidden = activate(wide(pre) if activation in GATES else pre, activation).to(pre.dtype)
    needs_dup_bias = needs_dbiases and up_bias is not None
    dpre, dup_bias = extension.op("ffn_dpre")(
        dy, down_weight, pre, activation, transposed, needs_dup_bias
    )
    no_pre = x.new_empty(0)
    _, ddown_weight, ddown_bias = linear_act_backward(
        dy, hidden, down_weight, down_bias, no_pre, "none", transposed, False, needs_dbiases,
        needs_ddown, down_weight_grad,
    )  # fmt: skip
    dx, dup_weight, _ = linear_act_backward(
        dpre, x, up_weight, None, no_pre, "none", transposed, needs_dx, False, needs_dup,
        up_weight_grad,
    )  # fmt: skip
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias
