"""The one comparator and the one tolerance of the project: tests, ``fused-lm parity`` and
``verify``.

A result is right when its error against fp64 is at most twice the error that PyTorch itself makes
in the same dtype, plus a few roundings of the largest value:

    max|ours - fp64| <= 2 * max|torch same dtype - fp64| + ROUNDINGS * eps(dtype) * max|fp64|

The comparator looks at shape, dtype and the positions of NaN and inf before any value, so that a
NaN can't get lost in a ``max``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUNDINGS = 4.0
"""Roundings of the largest value that are free: the last bits of an input, a product, a sum, a
store.
"""


@dataclass(frozen=True)
class Comparison:
    """Outcome of one comparison: ``error`` and ``allowed`` are absolute; ``problem`` is None if
    ok.
    """

    name: str
    error: float
    allowed: float
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


def max_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference where ``exact`` is finite; inf if a non-finite value stands
    elsewhere.
    """
    if got.numel() == 0:
        return 0.0
    finite = torch.isfinite(exact)
    difference = (got.double() - exact.double()).abs()[finite]
    if difference.numel() == 0:
        return 0.0
    return float("inf") if bool(torch.isnan(difference).any()) else float(difference.max())


def compare(
    got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, name: str = "result"
) -> Comparison:
    """Compares ``got`` with the fp64 result ``exact``, measured by PyTorch's own ``same_dtype``
    result.

    Args:
        got: The tensor to judge.
        same_dtype: The same formula, run by plain PyTorch operators in the dtype of ``got``.
        exact: The same formula in fp64, from the same (rounded) inputs.
        name: What the tensor is called in the message.
    """
    if got.shape != exact.shape:
        return _failed(name, f"shape {list(got.shape)}, expected {list(exact.shape)}")
    if got.dtype != same_dtype.dtype:
        return _failed(name, f"dtype {got.dtype}, expected {same_dtype.dtype}")
    got, exact = got.detach(), exact.detach().to(got.device).double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        mismatch = test(got) != test(exact)
        if bool(mismatch.any()):
            where = [int(i) for i in mismatch.nonzero()[0]]
            value, wanted = got[tuple(where)].item(), exact[tuple(where)].item()
            count = int(mismatch.sum())
            return _failed(
                name, f"{kind} differs at {count} places, first {where}: {value}, expected {wanted}"
            )
    error, allowed = max_error(got, exact), allowed_error(same_dtype.detach().to(got.device), exact)
    if error <= allowed:
        return Comparison(name, error, allowed, None)
    difference = torch.where(
        torch.isfinite(exact), (got.double() - exact).abs(), torch.zeros_like(exact)
    )
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    value, wanted = got[tuple(where)].item(), exact[tuple(where)].item()
    problem = (
        f"error {error:.3e} > allowed {allowed:.3e}, worst at {where}: {value}, expected {wanted}"
    )
    return Comparison(name, error, allowed, f"{name}: {problem}")


def allowed_error(same_dtype: torch.Tensor, exact: torch.Tensor) -> float:
    """The right side of the rule in the module's docstring."""
    finite = exact[torch.isfinite(exact)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return (
        2.0 * max_error(same_dtype, exact) + ROUNDINGS * torch.finfo(same_dtype.dtype).eps * largest
    )


def check_close(
    got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, name: str = "result"
) -> None:
    """:func:`compare` that raises AssertionError with the worst index and both values."""
    result = compare(got, same_dtype, exact, name)
    if not result.ok:
        raise AssertionError(result.problem)


def _failed(name: str, problem: str) -> Comparison:
    return Comparison(name, float("inf"), 0.0, f"{name}: {problem}")
