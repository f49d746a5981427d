"""The passes of a run that are timed, and their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from fused_lm.parity.timing import interleaved_times, median

from .contest import Given, Run

SECONDS_PER_CALL = 0.05
HOST_RUNS, DRY_RUNS = 20, 1


def host_us(run: Run, gpu: bool) -> float:
    """Median time in which a call returns, the GPU's queue empty."""
    times = []
    for _ in range(HOST_RUNS if gpu else DRY_RUNS):
        if gpu:
            torch.cuda.synchronize()
        begin = perf_counter()
        run()
        times.append((perf_counter() - begin) * 1e6)
    return median(times)


def _without_grad(run: Run, out: Tensor, given: Given) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            run()

    return forward


def _backward(run: Run, out: Tensor, given: Given) -> Callable[[], None]:
    def backward() -> None:
        torch.autograd.grad(out, given.leaves, given.dout, retain_graph=True)

    return backward


def _step(run: Run, out: Tensor, given: Given) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(run(), given.leaves, given.dout)

    return step


def _train(run: Run, out: Tensor, given: Given) -> Callable[[], None]:
    optimizer = given.optimizer
    assert optimizer is not None

    def train() -> None:
        gradients = torch.autograd.grad(run(), given.leaves, given.dout)
        for leaf, gradient in zip(given.leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return train


WAYS: dict[str, Callable[[Run, Tensor, Given], Callable[[], None]]] = {
    "fwd": _without_grad,
    "bwd": _backward,
    "step": _step,
    "train": _train,
}


def times_of(calls: Sequence[Callable[[], None]], device: torch.device) -> list[list[float]]:
    """Microseconds of each call, taken in turns."""
    if not calls:
        return []
    if device.type == "cuda":
        return interleaved_times(calls, SECONDS_PER_CALL * len(calls), least=5)
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(DRY_RUNS):
        for call, times in zip(calls, found, strict=True):
            begin = perf_counter()
            call()
            times.append((perf_counter() - begin) * 1e6)
    return found


def spread(times: Sequence[float]) -> float:
    """From the 10th to the 90th percentile, in units of the median."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return (ordered[-1 - tenth] - ordered[tenth]) / median(times)
