"""What a race is made of: cases, and who runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import fused_lm
from fused_lm import dispatch, use_backend
from fused_lm.explain import call_of

RACES = ("attention", "train", "block", "layernorm", "loss", "ffn")
"""Modules of this package, in order of worth."""
OURS = ("cuda", "triton", "fused_lm", "fused_lm compiled", "cuda in order")
"""Contestants of the races that are this project's kernels."""
MOST_SCORES_GIB = 1.25

Run = Callable[[], Tensor]
"""One call, whose output is differentiated."""
Formula = Callable[[Any, dict[str, Any]], Any]
"""Of a case and its values, as a textbook has it: the output, or that and what else is returned."""


@dataclass(frozen=True)
class Given:
    """What every contestant of a case gets.

    Attributes:
        values: By name, as the contestants of the operator know them.
        leaves: Those with a gradient.
        dout: Gradient of the output.
        error: Of an output and the gradients of the leaves, in units of the exact ones' norms, the
            largest; NaN if any is. None: nothing to compare with, as where each draws its own
            dropout mask.
        optimizer: Of the leaves, for the pass "train".
    """

    values: dict[str, Any]
    leaves: Sequence[Tensor]
    dout: Tensor
    error: Callable[[Sequence[Tensor]], float] | None
    optimizer: torch.optim.Optimizer | None = None


class Work(NamedTuple):
    """Of one pass, by the textbook."""

    flops: float
    bytes: float
    tokens: int = 0  # where their number per second is the measure, and energy counts


class Case(Protocol):
    """One shape with its features."""

    @property
    def name(self) -> str: ...

    def given(self, device: torch.device) -> Given: ...

    def work(self) -> dict[str, Work]:
        """Of the passes that are timed: "fwd", "bwd", "step", which is both together, or "train",
        which is a step with the optimizer's.
        """


class Contestant(NamedTuple):
    """Who runs a case.

    Attributes:
        prepare: May raise ImportError, or what a refusal raises there.
        compiles: At its first call, for seconds, into a cache on disk.
        within: What all of its work is done in, backwards too.
    """

    name: str
    prepare: Callable[[Any, dict[str, Any]], Run]
    compiles: bool = False
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def ours(op: str, backend: str, arguments: dict[str, Any]) -> Run:
    """A call of ours on one backend; of an operator that returns more than one tensor the first.

    Raises:
        ValueError: The backend can't run it, in its sentence alone.
    """
    impl = next(impl for impl in dispatch.TABLE[op] if impl.name == backend)
    reason = impl.refuses(call_of(op, **arguments))
    if reason is not None:
        raise ValueError(reason)
    function = getattr(fused_lm, op)

    def run() -> Tensor:
        with use_backend(backend):
            return first(function(**arguments))

    return run


def first(result: Any) -> Tensor:
    """The output, of operators that return more beside it too."""
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    return out


def eager(formula: Formula) -> Contestant:
    """A formula in eager PyTorch."""
    return Contestant("eager", lambda case, values: lambda: first(formula(case, values)))


def compiled(formula: Formula) -> Contestant:
    def prepare(case: Any, values: dict[str, Any]) -> Run:
        check_compiles()
        run: Formula = torch.compile(formula, dynamic=False)
        return lambda: first(run(case, values))

    return Contestant("compiled", prepare, compiles=True)


def check_compiles() -> None:
    """Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("compiling takes a CPU half a minute")


def check_scores(case: Any) -> None:
    """Raises ValueError where whole score matrices would take more memory and time than all others
    together.
    """
    gib = 2.0 * case.batch * case.heads * case.T * case.S / 2**30
    if gib > MOST_SCORES_GIB:
        raise ValueError(f"its scores are {gib:.0f} GiB, several times over")


def relative_error(got: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest, of tensors each as large as its exact one; NaN if any is."""
    errors = [
        (mine.double() - truth).norm() / truth.norm().clamp_min(1e-30)
        for mine, truth in zip(got, exact, strict=True)
    ]
    return float(torch.stack(errors).max())
