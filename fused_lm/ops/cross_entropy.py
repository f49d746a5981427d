"""``cross_entropy``: the public function and the way of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.cross_entropy_checks import CrossEntropyCall, checked_call
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.pytorch import cross_entropy as pytorch_cross_entropy
from fused_lm.reference import cross_entropy as reference

OPS = ("cross_entropy",)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Softmax cross entropy over the last dim; the kernel makes loss and gradient in one pass.

    ``s = softcap * tanh(logits / softcap)`` (without softcap the logits), ``lse = logsumexp(s)``,
    ``loss = (1 - eps) * (lse - s[target]) + eps * (lse - mean(s)) + z_loss * lse**2``

    As ``torch.nn.functional.cross_entropy`` where both can, except that classes are the last dim
    and the loss is fp32: NaN for the mean of no rows, inf for a logit of -inf under smoothing.

    Args:
        logits: [..., V] bf16 | fp16 | fp32 | fp64, V >= 1.
        target: [...] integers, in [0, V) or ignore_index.
        ignore_index: Rows with this target have loss 0 and gradient 0.
        label_smoothing: eps, in [0, 1].
        z_loss: Factor of ``lse**2``, >= 0.
        softcap: Bound of the scores, > 0; 0 for none. A masked logit of -inf becomes -softcap.
        reduction: "mean" over the rows that count, "sum", or "none".
        inplace_backward: The backward writes the gradient into the memory of the logits, which must
            be an intermediate result. Logits that are then used again raise in autograd, a second
            backward and second derivatives raise as well. Under ``torch.compile``, ``torch.func``
            transforms and dispatch modes the gradient gets its own memory.
    Returns:
        [], or [...] for "none"; fp32, fp64 for fp64.
    Accuracy: everything in fp32; |err| <= 2 x the error of the fp32 torch formula.
    Memory: with a gradient, one tensor like the logits, made with the loss (fp16, whose small
        gradients must meet the loss scale before they are rounded, and inplace_backward: in the
        backward). ``retain_graph`` computes it anew from the logits.
    Backends: cuda sm_80+, triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, IndexError on a target
        out of range on the CPU (on a GPU loss and gradient of its row are NaN by the kernel, and
        PyTorch's operators stop the device), RuntimeError if a forced backend refuses.
    Source: Milakov, Gimelshein 2018 (arXiv:1805.02867); Szegedy et al. 2016 (arXiv:1512.00567).
    """
    call = checked_call(
        logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction, inplace_backward
    )
    backend = dispatch.choose("cross_entropy", call)
    if backend == "pytorch":
        return pytorch_cross_entropy.cross_entropy(
            logits, target, ignore_index, label_smoothing, reduction
        )
    return _RUN((*call[:-1], _gradient_of(call)), backend)[0]


def _gradient_of(call: CrossEntropyCall) -> str:
    """When the gradient is made: "never", "with the loss", "in the backward" or "in place"."""
    if not registration.needs_gradient((call.logits,)):
        return "never"
    if call.inplace_backward and not is_compiling():
        return "in place"
    # A gradient of the mean over 16k rows is below fp16's smallest number for all but the likely
    # tokens: it must meet the loss scale, which only the backward knows, before it is rounded.
    late = call.logits.dtype == torch.float16 or registration.through_reference((call.logits,))
    return "in the backward" if late else "with the loss"


def _by_rows(
    forward: Callable[..., Any], logits: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Runs a forward on rows [N, V] and gives the losses the shape of the target again."""
    loss, *others = forward(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), *rest)
    return loss.view(target.shape) if loss.dim() else loss, *others


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    logits, target, *ctx.options = inputs
    loss, dlogits = output
    ctx.handed_over = False
    ctx.save_for_backward(logits, target, dlogits)
    return (loss,)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of the 9 inputs: logits have one."""
    nothing: tuple[None, ...] = (None,) * 8
    if dloss is None:
        return None, *nothing
    logits, target, dlogits = ctx.saved_tensors
    *options, gradient, backend = ctx.options
    shape = logits.shape
    dloss = dloss.reshape(-1) if dloss.dim() else dloss
    if gradient == "in place" and _may_write(logits):
        _overwrite(logits, dloss, target.reshape(-1), options, backend)
        return logits.detach(), *nothing
    if gradient == "with the loss" and not torch.is_grad_enabled():
        if not _may_write(dlogits):
            return reference.scaled(dlogits, dloss).view(shape), *nothing
        # The buffer goes to autograd as it is, scaled in place: so a dloss of 1 costs no traffic. A
        # second backward through the same graph goes the long way.
        if not ctx.handed_over:
            ctx.handed_over = True
            given = dlogits.data
            registration.function_of("cross_entropy_scale_in_place", backend)(given, dloss)
            return given.view(shape), *nothing
    arguments = (dloss, logits.reshape(-1, shape[-1]), target.reshape(-1), *options, backend)
    return registration.run_backward("cross_entropy_bwd", *arguments).view(shape), *nothing


def _may_write(t: Tensor) -> bool:
    """Whether memory can be written behind the dispatcher's back: nobody traces or watches."""
    return type(t) is Tensor and not is_compiling() and not _len_torch_dispatch_stack()


def _overwrite(
    logits: Tensor, dloss: Tensor, target: Tensor, options: list[Any], backend: str
) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward overwrites the logits, which second derivatives need:"
            " call cross_entropy without it"
        )
    rows = logits.detach().view(-1, logits.shape[-1])
    overwrite = registration.function_of("cross_entropy_bwd_in_place", backend)
    overwrite(dloss, rows, target, *options)
    increment_version(logits)


def _fake(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, gradient, _ = rest
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=wide)
    return loss, logits.new_empty(logits.shape if gradient == "with the loss" else (0,))


def _fake_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


registration.implement("cross_entropy_fwd", "cross_entropy", "cross_entropy_forward")
registration.implement("cross_entropy_bwd", "cross_entropy", "cross_entropy_backward")
registration.stand_beside("cross_entropy_scale_in_place", "cross_entropy", "scale_in_place")
registration.stand_beside(
    "cross_entropy_bwd_in_place", "cross_entropy", "cross_entropy_backward_in_place"
)
for _op, _shapes in (("cross_entropy_fwd", _fake), ("cross_entropy_bwd", _fake_backward)):
    registration.register_fake(_op, _shapes)
    registration.register_fake_of_cuda(_op, _shapes)
for _way in ("bwd", "rows", "scale"):
    registration.register_fake_of_cuda(f"cross_entropy_{_way}_in_place", lambda *_: None)
registration.register_autograd("cross_entropy_fwd", _backward, _setup)
register_reference_gradient("cross_entropy_bwd", reference.cross_entropy_backward)
_RUN = registration.route(
    "cross_entropy_fwd", 1, reference.cross_entropy_forward, _setup, _backward, adapt=_by_rows
)
