"""What the GPU suite runs, in order of worth."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import Any

import torch

from benchmarks.stages import Piece, Stage
from fused_lm.cuda import extension

TEST_PROCESSES = 8
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
OURS = "kernel_substring=fused_lm"
MORE = "run it again"
"""In the last words of a program that the time was too short for."""
PROOFS = "proofs"
"""Stages that share the GPU, since they take no times."""
QUICK = ("environment", "kernels", "record")
"""Parity and record."""


def all_stages(device: str, commit: str) -> list[Stage]:
    """In order of worth."""
    gpu = device == "cuda"

    def python(*arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments]

    def verify(piece: Piece, kernels: str) -> list[str]:
        minutes = max(0.1, (piece.seconds - 10.0) / 60.0)  # it writes its records at the end
        extent = ["--only", f" {kernels}", *["--again"] * piece.first]
        if not gpu:
            extent = ["--limit", "1"]
        where = ["--device", device, "--out", str(piece.folder)]
        return python("fused_lm", "verify", "--minutes", f"{minutes:.2f}", *where, *extent)

    def record(name: str, kernels: str) -> Stage:
        options: dict[str, Any] = {"headline": r"\d passed", "more": MORE}
        return Stage(name, lambda piece: verify(piece, kernels), 600.0, 40.0, **options)

    def roofs(piece: Piece) -> list[str]:
        return python("benchmarks.roofs", "--device", device, "--out", str(piece.folder))

    def race(name: str) -> Stage:
        def command(piece: Piece) -> list[str]:
            minutes = f"{max(0.1, (piece.seconds - 15.0) / 60.0):.2f}"  # it ends after a case
            out = ["--out", str(piece.folder), "--commit", commit, "--device", device]
            return python(f"benchmarks.{name}", "--minutes", minutes, *out)

        return Stage(name, command, 600.0, 40.0, r"\d cases", more=MORE)

    def sanitizer(tool: str) -> Stage:
        quiet = ["--print-level", "error"] if tool == "racecheck" else []
        run = ["compute-sanitizer", "--tool", tool, "--kernel-name", OURS, *quiet]
        command = [*run, "--error-exitcode", "9", *_pytest("tests/test_gpu_kernels.py")]
        said = r"(ERROR|RACECHECK) SUMMARY"
        options: dict[str, Any] = {"refusal": _no_sanitizer, "beside": PROOFS}
        return Stage(tool, lambda _: command, 240.0, 60.0, said, **options)

    doctor = python("fused_lm", "doctor", "--json")
    smi = ["nvidia-smi", "-q", "-d", "CLOCK,POWER"]
    kernels = _pytest("-m", "gpu", *_in_parallel(), "tests/test_gpu_kernels.py")
    refusal = _no_extension
    if not gpu:
        refusal = _nothing
        kernels = _pytest("tests/test_simt_attention_extremes.py", "-k", "simt_plain and key")
    return [
        Stage("environment", lambda _: doctor, 60.0, headline=r"\"torch\""),
        Stage("clocks", lambda _: smi, 20.0, headline="SM", refusal=_no_smi),
        Stage("roofs", roofs, 60.0),
        Stage(
            *("kernels", lambda _: kernels, 300.0, 20.0, r"passed|failed|error"),
            refusal=refusal,
            beside=PROOFS,
        ),
        *(sanitizer(tool) for tool in SANITIZERS),
        record("record", "cuda"),
        race("attention"),
        race("layernorm"),
        race("loss"),
        record("record of Triton", "triton"),
    ]


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _in_parallel() -> list[str]:
    return ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU"


def _nothing() -> str | None:
    return None


def _no_extension() -> str | None:
    return extension.refusal_on("cuda", 0)


def _no_smi() -> str | None:
    return None if shutil.which("nvidia-smi") else "nvidia-smi is not installed"


def _no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not installed"
    return _no_gpu() or _no_extension()
