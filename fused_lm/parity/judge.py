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
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    same = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, near, true = ours(*leaves), formula(*same), formula(*exact)
    cotangents = [torch.randn_like(t.detach().float()) for t in got]
    for cotangent, output in zip(cotangents, true, strict=True):
        cotangent.masked_fill_(~torch.isfinite(output.detach()), 0.0)
    rounded = [c.to(t.dtype) for c, t in zip(cotangents, got, strict=True)]
    results = [
        (*(t.detach() for t in outputs), *gradients(outputs, points, rounded))
        for outputs, points in ((got, leaves), (near, same), (true, exact))
    ]
    if inputs[0].dtype == torch.float64:
        results[1] = _as_if_rounded(formula, inputs, rounded, results[2])
    names = [*output_names, *(f"d{name}" for name in input_names)]
    return [
        compare(mine, yardstick.to(mine.dtype), truth, name)
        for name, mine, yardstick, truth in zip(names, *results, strict=True)
    ]


def _as_if_rounded(
    formula: Function,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    exact: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """fp64 has no wider truth: its own error is estimated as fp32's, scaled by the ratio of eps."""
    points = [t.detach().float().requires_grad_() for t in inputs]
    outputs = formula(*points)
    narrow = (*(t.detach() for t in outputs), *gradients(outputs, points, cotangents))
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
