"""``linear_cross_entropy``: the public function and the way of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.cross_entropy_checks import LinearCrossEntropyCall, checked_linear_call
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import linear_cross_entropy as pytorch_linear_cross_entropy
from fused_lm.reference import linear_cross_entropy as reference
from fused_lm.reference.cross_entropy import scaled

OPS = ("linear_cross_entropy",)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """:func:`fused_lm.cross_entropy` of ``x @ weight.T + bias``, whose logits never exist whole.

    Rows are taken in chunks: logits of a chunk, the kernel turns them into their gradient in place,
    and dx, dweight and dbias take their share of it; dweight and dbias add up in fp32. The three
    products are torch's own (cuBLAS), in the backend cuda those of ``linear_act`` for 16 bits and
    widths C and V that are multiples of 8; loss and gradient of the logits are one kernel.

    Args:
        x: [..., C] bf16 | fp16 | fp32 | fp64; under autocast its dtype. Logits have this dtype.
        weight: [V, C], any float dtype; the products take it in the dtype of x.
        target: [...] integers, in [0, V) or ignore_index.
        bias: [V], any float dtype, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: As in
            :func:`fused_lm.cross_entropy`.
        chunk_rows: Rows at a time. Default: by a formula, see
            ``fused_lm.reference.linear_cross_entropy.rows_per_chunk``: 2560 to 5119, all of fewer.
    Returns:
        [], or [...] for "none"; fp32, fp64 for fp64.
    Accuracy: |err| <= 2 x the error of torch's linear layer in the dtype of x and cross entropy in
        fp32; dweight of many chunks is more exact than one 16-bit product.
    Memory: chunk_rows * V logits. From forward to backward ("mean", "sum") dx like x and dweight in
        fp32, instead of N * V logits; "none" keeps nothing and computes the logits twice. Second
        derivatives and ``torch.func`` transforms make the whole logits.
    Backends: cuda sm_80+; triton; pytorch, where one chunk holds all rows and the whole logits are
        no more than a chunk would be; reference, the same chunks in plain PyTorch.
    Raises: As :func:`fused_lm.cross_entropy`.
    Source: Hsu et al. 2024 (arXiv:2410.10989) for chunks.
    """
    call = checked_linear_call(
        x, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction,
        chunk_rows,
    )  # fmt: skip
    backend = dispatch.choose("linear_cross_entropy", call)
    dtype = registration.autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    if backend == "pytorch":
        return pytorch_linear_cross_entropy.linear_cross_entropy(
            x, weight, bias, target, ignore_index, label_smoothing, reduction
        )
    return _RUN((x, weight, bias, target, *call[4:], *_needs_of(call)), backend)[0]


def _needs_of(call: LinearCrossEntropyCall) -> tuple[bool, bool, bool]:
    """Whether autograd wants a gradient of x, weight and bias."""
    x, weight, bias = ((t,) for t in (call.x, call.weight, call.bias))
    needs = registration.needs_gradient
    return needs(x), needs(weight), needs(bias)


def _by_rows(
    forward: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Runs a forward on rows [N, C] and gives the losses the shape of the target again."""
    rows = x.reshape(-1, x.shape[-1])
    loss, *others = forward(rows, weight, bias, target.reshape(-1), *rest)
    return loss.view(target.shape) if loss.dim() else loss, *others


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, target, *output[1:])
    return output[:1]


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the 14 inputs: x, weight and bias have one."""
    nothing: tuple[None, ...] = (None,) * 11
    if dloss is None:
        return None, None, None, *nothing
    x, weight, bias, target, row_weight, *found = ctx.saved_tensors
    needs, reduction = ctx.options[6:9], ctx.options[4]
    if reduction != "none" and not torch.is_grad_enabled():
        factor = dloss * row_weight
        dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        gradients = [scaled(t, factor, dtype) for t, dtype in zip(found, dtypes, strict=True)]
    else:
        dloss = dloss.reshape(-1) if dloss.dim() else dloss
        rows = x.reshape(-1, x.shape[-1])
        arguments = (dloss, rows, weight, bias, target.reshape(-1), *ctx.options)
        gradients = registration.run_backward("linear_cross_entropy_bwd", *arguments)
    dx, dweight, dbias = (t if need else None for t, need in zip(gradients, needs, strict=True))
    return None if dx is None else dx.view(x.shape), dweight, dbias, *nothing


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, reduction, _, needs_dx, needs_dweight, needs_dbias, _ = rest
    needs = reference.needs_with_the_loss(reduction, needs_dx, needs_dweight, needs_dbias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(target.shape if reduction == "none" else (), dtype=wide),
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if needs.dx else 0),
        x.new_empty(weight.shape if needs.dweight else 0, dtype=wide),
        x.new_empty(weight.shape[:1] if needs.dbias else 0, dtype=wide),
    )


def _fake_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs_dx, needs_dweight, needs_dbias, _ = rest[-4:]
    like_bias = weight if bias is None else bias
    return (
        x.new_empty(x.shape if needs_dx else 0),
        weight.new_empty(weight.shape if needs_dweight else 0),
        like_bias.new_empty(weight.shape[:1] if needs_dbias else 0),
    )


registration.implement(
    "linear_cross_entropy_fwd", "linear_cross_entropy", "linear_cross_entropy_forward"
)
registration.implement(
    "linear_cross_entropy_bwd", "linear_cross_entropy", "linear_cross_entropy_backward"
)
registration.register_fake("linear_cross_entropy_fwd", _fake)
registration.register_fake("linear_cross_entropy_bwd", _fake_backward)
registration.register_autograd("linear_cross_entropy_fwd", _backward, _setup)
register_reference_gradient("linear_cross_entropy_bwd", reference.whole_backward)
_RUN = registration.route(
    "linear_cross_entropy_fwd", 3, reference.whole_forward, _setup, _backward, adapt=_by_rows
)
