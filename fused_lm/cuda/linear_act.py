"""Linear layers with their activation by ``csrc/linear_act.cpp``: products of the tensor cores
whose epilogue is the layer.

Arguments are those of ``fused_lm.reference.linear_act``; the dispatcher refuses what is no float16
or bfloat16 and widths that are no multiples of 8.
"""

from __future__ import annotations

from torch import Tensor

from fused_lm.cuda import extension


def linear_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None,
    activation: str,
    transposed: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """x [N, C] -> y [N, F] and pre [N, F] (gated: [N, 2F]; empty unless ``keep_pre``)."""
    return extension.op("linear_act_fwd")(
        x, weight, bias, weight_grad, activation, transposed, keep_pre
    )


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
    tensors = (dy, x, weight, bias, pre, activation, transposed, needs_dx, needs_dbias)
    if weight_grad is None:
        return extension.op("linear_act_bwd")(*tensors, needs_dweight)
    return extension.op("linear_act_bwd_add")(*tensors, False, weight_grad)
