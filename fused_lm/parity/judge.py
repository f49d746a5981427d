"""Outputs and every gradient of a function, held against a formula in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_lm.tolerance import Comparison, compare

Function = Callable[..., Sequence[Tensor]]


def judge(
    ours: Function,
    formula: Function,
    inputs: Sequence[Tensor],
    output_names: Sequence[str],
    input_names: Sequence[str],
) -> list[Comparison]:
    """Compares each output and each input's gradient, in order.

    Args:
        ours: Takes the inputs, returns the outputs to judge.
        formula: The same by plain autograd; run in fp64 and in the inputs' own dtype.
        inputs: Tensors; each becomes a leaf.
        output_names, input_names: For the comparisons: ``out``, and ``dq`` for input ``q``.
    """
    dtype = inputs[0].dtype
    rounded: list[Tensor] = []

    def run(function: Function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Outputs and gradients; one graph at a time, because fp64 scores fill a GPU's memory."""
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        if not rounded:
            rounded.extend(_cotangent(t.detach()) for t in outputs)
        return (*(t.detach() for t in outputs), *gradients(outputs, leaves, rounded))

    results = [run(ours, dtype), run(formula, dtype), run(formula, torch.float64)]
    if dtype == torch.float64:
        results[1] = _as_if_rounded(results[2], run(formula, torch.float32))
    names = [*output_names, *(f"d{name}" for name in input_names)]
    return [
        compare(mine, yardstick.to(mine.dtype), truth, name)
        for name, mine, yardstick, truth in zip(names, *results, strict=True)
    ]


def _cotangent(output: Tensor) -> Tensor:
    """Random, in the output's dtype, 0 where the output is not finite (lse of an empty row)."""
    random = torch.randn_like(output.float()).to(output.dtype)
    return random.masked_fill(~torch.isfinite(output), 0.0)


def _as_if_rounded(exact: tuple[Tensor, ...], narrow: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """fp64 has no wider truth: its own error is estimated as fp32's, scaled by the ratio of eps."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return tuple(
        torch.where(torch.isfinite(e), e + (n.double() - e) * ratio, e)
        for n, e in zip(narrow, exact, strict=True)
    )


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(outputs * cotangents)``; zeros where an input has no influence."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [c.to(o.dtype) for o, c in pairs],
        allow_unused=True,
    )
    return tuple(
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
    )
