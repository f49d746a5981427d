"""The process in which ``verify`` runs its jobs: parity of cases, or their times against PyTorch's.

``python -m fused_lm.parity.worker --device cuda --phase parity --jobs 0,3 --results FILE``; see
:mod:`.supervise`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fused_lm
from fused_lm import dispatch, records
from fused_lm.cuda import extension
from fused_lm.explain import call_of
from fused_lm.parity.cases import (
    SMALL,
    AttentionCase,
    Case,
    DecodeCase,
    RotaryCase,
    VarlenCase,
    WeightsCase,
    verify_cases,
)
from fused_lm.parity.run import DTYPES, run_case, use_interpreter_without_gpu, within_limits
from fused_lm.parity.supervise import RESTART
from fused_lm.parity.timing import interleaved_medians

TIMES_SECONDS, LEAST_ROUNDS = 0.05, 7
"""Of both calls together: minutes are few where many kernels are to be timed."""
LONG = 4096
"""Rows from which parity looks at one batch entry and one head: its fp64 scores are T x S."""


class Job(NamedTuple):
    """One kernel to prove and to time."""

    case: Case
    dtype: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case.name} {self.dtype} {self.backend}"


def jobs_for(device: torch.device) -> list[Job]:
    """Every kernel that can run here, in order of worth; the same list in parent and worker."""
    on_cpu = device.type == "cpu"
    cases = SMALL if on_cpu else verify_cases()
    dtypes = ("float32", "bfloat16") if on_cpu else ("bfloat16", "float16", "float32")
    return [
        Job(case, dtype, impl.name)
        for dtype in dtypes
        for case in cases
        for impl in dispatch.TABLE[case.op]
        if impl.needs_record and _can_run(impl.name, device) and not _same_as_unmixed(case, dtype)
        if within_limits(case, impl.name, dtype)
    ]


def _same_as_unmixed(case: Case, dtype: str) -> bool:
    """In fp32 a residual stream kept in fp32 mixes nothing."""
    return dtype == "float32" and "mixed" in getattr(case, "features", ())


def _can_run(backend: str, device: torch.device) -> bool:
    """Without a GPU Triton's kernels run in the interpreter, others not at all; with one, a missing
    Triton is told job by job, a missing extension by ``doctor``.
    """
    if backend != "cuda":
        return True
    return device.type == "cuda" and extension.refusal_on(device.type, device.index) is None


def prove_job(job: Job, device: torch.device) -> dict[str, Any]:
    """Parity, and on a GPU what a record of it is about."""
    case, dtype, backend = job
    result = run_case(_slice(case), backend, dtype, device)
    report = {**result.as_dict(), "case": case.name, "parity": result.ok}
    if device.type == "cuda":
        report.update(labels_of(job, device))
    return report


def time_job(job: Job, device: torch.device) -> dict[str, Any]:
    """The ratio of PyTorch's time to ours for inference and training; needs a GPU."""
    try:
        return {"problem": None, "times": _times(job, device)}
    except torch.OutOfMemoryError as error:
        return {"problem": str(error).split("\n")[0]}


def labels_of(job: Job, device: torch.device) -> dict[str, Any]:
    """What a record of this job is about."""
    case, dtype, backend = job
    problem = case.build(DTYPES[dtype], torch.device("meta"))
    family, size = records.SHAPE_CLASSES[case.op](call_of(case.op, **problem.arguments))
    index = torch.cuda.current_device() if device.index is None else device.index
    return {
        "op": case.op, "backend": backend, "dtype": dtype, "family": family, "size": size,
        "kernel": records.kernel_id(case.op, backend, index),
        "training_kernel": records.kernel_id(case.op, backend, index, "train"),
        "gpu": torch.cuda.get_device_name(index),
    }  # fmt: skip


def has_record(job: Job, device: torch.device) -> bool:
    """Whether a record, shipped or the user's own, speaks of this kernel, class and GPU."""
    labels = labels_of(job, device)
    training = {**labels, "mode": "train", "kernel": labels.pop("training_kernel")}
    del training["training_kernel"]
    return all(
        any(all(getattr(r, k) == v for k, v in wanted.items()) for r in records.known())
        for wanted in (labels, training)
    )


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
    sliced = AttentionCase | WeightsCase | DecodeCase | VarlenCase | RotaryCase
    if not isinstance(case, sliced) or case.B * case.H <= 4:
        return case
    few = 1 if case.T > LONG else 2
    if isinstance(case, WeightsCase):
        return replace(case, B=few, H=few)
    return replace(case, B=few, H=few * (case.H // case.Hkv), Hkv=few)


def _times(job: Job, device: torch.device) -> dict[str, dict[str, float]]:
    case, dtype, ours = job
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
        calls = [make(ours, problem.theirs), make(peer, problem.theirs)]
        ours_us, theirs_us = interleaved_medians(calls, TIMES_SECONDS, LEAST_ROUNDS)
        found[mode] = {"ours_us": ours_us, "pytorch_us": theirs_us, "ratio": theirs_us / ours_us}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--phase", choices=("parity", "times"), required=True)
    parser.add_argument("--jobs", required=True, help="indices in jobs_for, like 3,15")
    parser.add_argument("--results", required=True)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if device.type == "cpu":
        use_interpreter_without_gpu()
        import fused_lm.triton_kernels.attention  # noqa: F401
    jobs = jobs_for(device)
    work = prove_job if args.phase == "parity" else time_job
    with open(args.results, "a") as results:
        for index in map(int, args.jobs.split(",")):
            report = work(jobs[index], device)
            results.write(json.dumps({"job": index, **report}) + "\n")
            results.flush()
            if device.type == "cuda":
                if not _context_alive():
                    return RESTART
                torch.cuda.empty_cache()  # it is the other lanes' memory too
    return 0


def _context_alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
