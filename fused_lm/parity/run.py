"""Runs cases and judges them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fused_lm
from fused_lm import dispatch
from fused_lm.cuda import extension
from fused_lm.explain import call_of
from fused_lm.ops import attention_backends, attention_decode_checks, attention_varlen_checks
from fused_lm.ops.checks import interpreting, triton_refusal
from fused_lm.parity.cases import Case
from fused_lm.parity.judge import judge

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


NOT_MEASURED = "not measured"
"""What stands for the worst tensor where the memory didn't suffice: no verdict on the kernel."""


@dataclass(frozen=True)
class Result:
    """Verdict on one case: the worst of its outputs and gradients, relative to what is allowed.

    Attributes:
        error, allowed: Of the tensor named ``worst``, absolute.
        problem: None if every tensor is within tolerance, else one sentence.
    """

    op: str
    case: str
    backend: str
    dtype: str
    device: str
    worst: str
    error: float
    allowed: float
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def use_interpreter_without_gpu() -> None:
    """Lets Triton's kernels run here in its interpreter; must come before triton is imported."""
    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


def run_case(case: Case, backend: str, dtype: str, device: torch.device) -> Result:
    """Runs one case; an exception becomes a result with its text as the problem."""
    torch.manual_seed(20240607)
    where = "interpreter" if backend == "triton" and interpreting() else device.type
    labels = (case.op, case.name, backend, dtype, where)
    try:
        with fused_lm.use_backend(backend):
            problem = case.build(DTYPES[dtype], device)
            comparisons = judge(
                problem.ours,
                problem.formula,
                problem.inputs,
                problem.output_names,
                problem.input_names,
            )
    except torch.OutOfMemoryError as error:
        text = f"not measured, {error}".split("\n")[0]
        return Result(*labels, NOT_MEASURED, float("inf"), 0.0, text)
    except Exception as error:  # whatever a kernel does, the other cases go on
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        return Result(*labels, "", float("inf"), 0.0, text)
    worst = max(comparisons, key=lambda c: (not c.ok, c.error / max(c.allowed, 1e-30)))
    return Result(*labels, worst.name, worst.error, worst.allowed, worst.problem)


def runnable(case: Case, backend: str, dtype: str, device: torch.device) -> bool:
    """Whether dispatch lets the backend take the case at all."""
    if backend not in (impl.name for impl in dispatch.TABLE[case.op]):
        return False
    if backend == "pytorch":
        return not {"dropout", "softcap"} & set(case.features)
    refusals = {"cuda": extension.refusal, "triton": triton_refusal}
    if backend in refusals:
        there = refusals[backend](torch.empty(0, device=device)) is None
        return there and dtype != "float64" and within_limits(case, backend, dtype)
    return True


def within_limits(case: Case, backend: str, dtype: str) -> bool:
    """Whether a backend has a kernel for such a call on any GPU: those of attention in CUDA take 16
    bits and some head dims.
    """
    if backend != "cuda" or not case.op.startswith("attention"):
        return True
    problem = case.build(DTYPES[dtype], torch.device("meta"))
    limits: dict[str, Callable[[Any], str | None]] = {
        "attention_decode": attention_decode_checks.cuda_limit,
        "attention_varlen": attention_varlen_checks.cuda_limit,
    }
    limit = limits.get(case.op, attention_backends.cuda_limit)
    return limit(call_of(case.op, **problem.arguments)) is None


def run_all(
    cases: tuple[Case, ...],
    device: torch.device,
    backends: tuple[str, ...],
    dtypes: tuple[str, ...],
) -> Iterator[Result]:
    """Every runnable combination, one result each."""
    for case in cases:
        for backend in backends:
            for dtype in dtypes:
                if runnable(case, backend, dtype, device):
                    yield run_case(case, backend, dtype, device)
