"""A module of ours against the stock one that it stands for: how far may it be from fp64?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_lm.tolerance import check_close

ROUNDINGS = 5
"""Of so many stock answers to inputs rounded anew the worst error is the yardstick: one answer in
16 bits is right by luck now and then.
"""

CANCELS = 4.0
"""Roundings of the largest result that each element may be off by in stock's own answer."""

Change = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Change], list[Tensor]]


def check_against_stock(
    stock: nn.Module, got: list[Tensor], run: Run, eps: float, roundings: int = ROUNDINGS
) -> None:
    """Holds every result against stock's in fp64.

    Args:
        stock: The module in the dtype to judge.
        got: Our results: outputs, then gradients.
        run: Takes a stock module and what to do with each float input; returns the same results.
        eps: Of the dtype that is computed in.
        roundings: Stock answers that make the yardstick. A ReLU needs many: rounding may switch a
            unit whose input is near 0, and then it takes all of a gradient away, or adds it.
    """
    exact = run(copy.deepcopy(stock).double(), Tensor.double)
    # Gradients may cancel to nothing: what cancels is as large as the largest result, and passes a
    # projection, the softmax and another projection, each way.
    largest = max((float(t.abs().max()) for t in exact if t.numel()), default=0.0)
    floor = CANCELS * eps * largest
    if eps == torch.finfo(torch.float64).eps:
        floor *= 2.0  # there the truth is rounded as often
    yardstick = [t + floor for t in exact]

    random = torch.Generator().manual_seed(0)  # of its own: run() may seed torch's

    def moved(t: Tensor) -> Tensor:
        """Each element moved by up to a unit in the last place or two: half of them move."""
        noise = 2.0 * torch.rand(t.shape, generator=random, dtype=torch.float64) - 1.0
        return (t.double() * (1.0 + eps * noise.to(t.device))).to(t.dtype)

    near: list[Tensor] = []
    for _ in range(roundings):
        twin = copy.deepcopy(stock)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.copy_(moved(parameter))
        near = run(twin, moved)
        yardstick = [_farther(y, n, e) for y, n, e in zip(yardstick, near, exact, strict=True)]
    assert len(got) == len(exact)
    for index, (mine, far, truth) in enumerate(zip(got, yardstick, exact, strict=True)):
        check_close(mine, far.to(near[index].dtype), truth, f"result {index}")


def _farther(one: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """Element by element whichever is farther from the truth."""
    return torch.where((other - truth).abs() > (one - truth).abs(), other.double(), one)
