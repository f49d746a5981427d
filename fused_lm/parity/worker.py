"""The process in which ``verify`` runs its jobs: parity of a case, then its time against PyTorch's.

``python -m fused_lm.parity.worker --device cuda --start 0 --stop 9 --results FILE``; see
:mod:`.supervise`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch

import fused_lm
from fused_lm import dispatch, records
from fused_lm.explain import call_of
from fused_lm.parity.cases import (
    SMALL,
    AttentionCase,
    Case,
    RotaryCase,
    WeightsCase,
    verify_cases,
)
from fused_lm.parity.run import DTYPES, run_case, use_interpreter_without_gpu
from fused_lm.parity.supervise import RESTART
from fused_lm.parity.timing import interleaved_medians

BACKEND = "triton"
LONG = 4096
"""Rows from which parity looks at one batch entry and one head: its fp64 scores are T x S."""


def jobs_for(device: str) -> list[tuple[Case, str]]:
    """Cases and dtypes in order of worth; the same list in parent and worker."""
    if device == "cpu":
        return [(case, dtype) for dtype in ("float32", "bfloat16") for case in SMALL]
    cases = verify_cases()
    return [(case, dtype) for dtype in ("bfloat16", "float16", "float32") for case in cases]


def run_job(case: Case, dtype: str, device: torch.device) -> dict[str, Any]:
    """Parity and, on a GPU, the ratio of PyTorch's time to ours for inference and training."""
    result = run_case(_slice(case), BACKEND, dtype, device)
    report = {**result.as_dict(), "case": case.name, "parity": result.ok}
    if device.type == "cuda":
        report.update(labels_of(case, dtype, torch.cuda.get_device_name(device)))
        if result.ok:
            try:
                report["times"] = _times(case, dtype, device)
            except torch.OutOfMemoryError as error:
                report["problem"] = f"not timed: {error}".split("\n")[0]
    return report


def labels_of(case: Case, dtype: str, gpu: str) -> dict[str, Any]:
    """What a record of this case is about."""
    problem = case.build(DTYPES[dtype], torch.device("meta"))
    family, size = records.SHAPE_CLASSES[case.op](call_of(case.op, **problem.arguments))
    kernel = records.kernel_id(case.op, BACKEND)
    return {
        "op": case.op, "backend": BACKEND, "dtype": dtype, "family": family, "size": size,
        "kernel": kernel, "gpu": gpu,
    }  # fmt: skip


def has_record(case: Case, dtype: str, gpu: str) -> bool:
    """Whether the user's own file already knows this kernel, class and GPU."""
    labels = labels_of(case, dtype, gpu)
    return any(all(getattr(r, k) == v for k, v in labels.items()) for r in records.known())


def without_kernels(op: str, arguments: dict[str, Any]) -> str:
    """The backend that ``auto`` takes for a call where no record speaks for a kernel."""
    call = call_of(op, **arguments)
    return next(
        impl.name
        for impl in dispatch.TABLE[op]
        if not impl.needs_record and impl.refuses(call) is None
    )


def _slice(case: Case) -> Case:
    """What parity can afford of a case: batch and heads are copies of one another."""
    if not isinstance(case, AttentionCase | WeightsCase | RotaryCase) or case.B * case.H <= 4:
        return case
    few = 1 if case.T > LONG else 2
    if isinstance(case, WeightsCase):
        return replace(case, B=few, H=few)
    return replace(case, B=few, H=few * (case.H // case.Hkv), Hkv=few)


def _times(case: Case, dtype: str, device: torch.device) -> dict[str, dict[str, float]]:
    problem = case.build(DTYPES[dtype], device)
    peer = without_kernels(case.op, problem.arguments)
    leaves = [t.detach().requires_grad_() for t in problem.inputs]

    def forward(backend: str, function: Any) -> Any:
        def run() -> None:
            with fused_lm.use_backend(backend), torch.no_grad():
                function(*problem.inputs)

        return run

    def step(backend: str, function: Any) -> Any:
        def run() -> None:
            with fused_lm.use_backend(backend):
                outputs = function(*leaves)
            torch.autograd.grad(outputs[0], leaves, torch.ones_like(outputs[0]))

        return run

    found = {}
    for mode, make in (("infer", forward), ("train", step)):
        ours_us, theirs_us = interleaved_medians(
            [make(BACKEND, problem.theirs), make(peer, problem.theirs)]
        )
        found[mode] = {"ours_us": ours_us, "pytorch_us": theirs_us, "ratio": theirs_us / ours_us}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--start", type=int, required=True)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--results", required=True)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        use_interpreter_without_gpu()
        import fused_lm.triton_kernels.attention  # noqa: F401
    jobs = jobs_for(device.type)
    with open(args.results, "a") as results:
        for index in range(args.start, min(args.stop, len(jobs))):
            case, dtype = jobs[index]
            known = device.type == "cuda" and not args.again
            if known and has_record(case, dtype, torch.cuda.get_device_name(device)):
                report: dict[str, Any] = {"problem": None, "skipped": True}
            else:
                report = run_job(case, dtype, device)
            results.write(json.dumps({"job": index, **report}) + "\n")
            results.flush()
            if device.type == "cuda" and not _context_alive():
                return RESTART
    return 0


def _context_alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
