"""``rotary`` and ``rotary_qk``: the public functions and the way of a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.rotary_checks import RotaryCall, checked_call
from fused_lm.pytorch import rotary as pytorch_rotary
from fused_lm.reference import rotary as reference
from fused_lm.reference.layout import empty_heads


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotary positions: turns each pair of dims by its angle, so that q.k depends on t - s only.

    ``a' = a cos - b sin; b' = b cos + a sin`` for the pairs (a, b) of row t.

    Args:
        x: [B, H, T, D] bf16 | fp16 | fp32 | fp64, queries or keys, any strides.
        cos, sin: [S, R/2], any float dtype, R <= D: the first R dims are turned, the rest is
            copied. Constants: they have no gradient. See ``fused_lm.nn.positions.rotary_tables``.
        positions: int64 [T] or [B, T]: the row of the tables for each row of x, as left-padded and
            packed sequences and caches need it. Default: row t for row t. On a CPU a position
            outside 0 .. S - 1 raises; on a GPU, where reading it would wait, the Triton kernel
            turns that row into zeros and PyTorch's operators stop with an assertion.
        interleaved: Pairs are (2i, 2i + 1), as in RoFormer and GPT-J, instead of (i, i + R/2), as
            in GPT-NeoX and Llama.
    Returns:
        [B, H, T, D], dtype of x, dense. From the kernels, rows that lie as [B, T, H, D] in memory
        stay so; PyTorch's operators write heads one after the other.
    Accuracy: computed in fp32 (fp64 for fp64); |err| <= 2 x the error of the same-dtype torch
        reference. Memory: nothing beyond the output; the backward needs only the tables.
    Backends: triton, pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Su et al. 2021 (arXiv:2104.09864) section 3.4.2.
    """
    return _turned(checked_call(x, cos, sin, positions, interleaved))[0]


def rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`rotary` of q [B, H, T, D] and k [B, Hkv, T, D] by one launch; returns both.

    Arguments, results and errors as there; k has the dtype of q, and its own number of heads.
    """
    q, k = _turned(checked_call(q, cos, sin, positions, interleaved, k))
    return q, k


def _turned(call: RotaryCall) -> tuple[Tensor, ...]:
    """x, and k where there is one."""
    backend = dispatch.choose("rotary", call)
    if backend == "pytorch":
        x, k, cos, sin, positions, interleaved = call
        tensors = (x,) if k is None else (x, k)
        return pytorch_rotary.rotary(tensors, cos, sin, positions, interleaved)
    return _run((*call, False), backend)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    _, k, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)
    return output[:1] if k is None else output


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the 8 inputs: x and k have one, which is theirs turned back."""
    cos, sin, positions = ctx.saved_tensors
    interleaved, inverse, backend = ctx.options
    wanted = [i for i, g in enumerate(gradients) if g is not None and ctx.needs_input_grad[i]]
    result: list[Any] = [None] * 8
    if wanted:
        first, *second = (gradients[i] for i in wanted)
        pair = (first, second[0] if second else None)
        arguments = (*pair, cos, sin, positions, interleaved, not inverse, backend)
        found = registration.run_backward("rotary_fwd", *arguments)
        for i, gradient in zip(wanted, found, strict=False):
            result[i] = gradient
    return tuple(result)


def _fake(x: Tensor, k: Tensor | None, cos: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    D = x.shape[3]
    return empty_heads(x, D), x.new_empty(0) if k is None else empty_heads(k, D)


registration.implement("rotary_fwd", "rotary", "rotary_forward")
registration.register_fake("rotary_fwd", _fake)
registration.register_autograd("rotary_fwd", _backward, _setup_context)
_run = registration.route("rotary_fwd", 5, reference.rotary_forward, _setup_context, _backward)
