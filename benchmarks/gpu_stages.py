"""What the GPU suite runs, in order of worth."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence

import torch

from fused_lm.cuda import extension

from .call_share import PLAIN, SANITIZERS
from .contest import RACES
from .stages import Piece, Stage

TEST_PROCESSES, SANITIZER_PROCESSES = 8, 3
CALLS_SECONDS = 240.0
"""Of the harness' calls, plain or under one sanitizer, in a round; all of these run at once."""
RECORD_SECONDS, WARM_SECONDS, TUNE_SECONDS = 200.0, 120.0, 240.0
SILENCE_SECONDS = 75.0
"""Of a race, whose contestants may compile for half a minute and more."""
MORE = "run it again"
"""In the last words of a program that the time was too short for."""
PROOFS = "proofs"
"""Stages that share the GPU, since they take no times."""
QUICK = ("environment", "kernels", "record")
"""Parity and record."""


RACE_SECONDS = {"attention": 60.0, "train": 60.0, "block": 45.0, "layernorm": 30.0}
OTHERS_SECONDS = 25.0
"""Of a race, in a round, so that all of them begin."""


def all_stages(device: str, commit: str, contestants: Sequence[str] = ()) -> list[Stage]:
    """In order of worth; races of all contestants, or of some."""
    return [
        *_surroundings(device),
        *_proofs(device),
        _warm(device),
        _record("record", device, "bfloat16"),
        *(_race(name, device, commit, contestants) for name in RACES),
        _record("record of others", device, "float16", "float32"),
        _tune(device, commit),
    ]


def _surroundings(device: str) -> list[Stage]:
    """What the numbers are to be read with."""
    doctor = _python("fused_lm", "doctor", "--json")
    smi = ["nvidia-smi", "-q", "-d", "CLOCK,POWER"]

    def roofs(piece: Piece) -> list[str]:
        return _python("benchmarks.roofs", "--device", device, "--out", str(piece.folder))

    return [
        Stage("environment", lambda _: doctor, 60.0, headline=r"\"torch\""),
        Stage("clocks", lambda _: smi, 20.0, headline="SM", refusal=_no_smi),
        Stage("roofs", roofs, 60.0),
    ]


def _proofs(device: str) -> list[Stage]:
    """The harness' calls, plain and under each sanitizer; on a CPU a few, on the harness."""
    if device == "cpu":
        plain = _tests("kernels", "tests/test_simt_attention_extremes.py", "simt_race and key")
    else:
        plain = _calls("kernels", PLAIN, TEST_PROCESSES, lambda: extension.refusal_on("cuda", 0))
    small = _tests("wrappers", "tests/test_gpu_wrappers.py", _of_wrappers(device))
    sanitizers = (_calls(tool, tool, SANITIZER_PROCESSES, _no_sanitizer) for tool in SANITIZERS)
    return [plain, small, *sanitizers]


def _tests(name: str, file: str, which: str) -> Stage:
    """Those of a file, by pytest's -k."""
    command = _python("pytest", "-q", "-p", "no:cacheprovider", file, "-k", which)
    return Stage(name, lambda _: command, 120.0, 20.0, r"passed|failed|error", beside=PROOFS)


def _of_wrappers(device: str) -> str:
    """Without a GPU there is the harness, which the golden numbers are of."""
    return "harness_own" if device == "cpu" else "gives"


def _calls(name: str, tool: str, processes: int, refusal: Callable[[], str | None]) -> Stage:
    """:mod:`benchmarks.gpu_calls`."""

    def command(piece: Piece) -> list[str]:
        minutes = f"{max(0.1, (piece.seconds - 8.0) / 60.0):.2f}"  # it ends its processes then
        extent = ["--minutes", minutes, "--processes", str(processes)]
        return _python("benchmarks.gpu_calls", tool, "--out", str(piece.folder), *extent)

    return Stage(
        *(name, command, CALLS_SECONDS, 40.0, r"\d+ calls:"),
        more=MORE,
        refusal=refusal,
        beside=PROOFS,
    )


def _warm(device: str) -> Stage:
    """Beside the proofs, since what it does takes no times either."""

    def command(piece: Piece) -> list[str]:
        minutes = f"{max(0.1, (piece.seconds - 15.0) / 60.0):.2f}"
        processes = ["--processes", "1"] if device == "cpu" else []
        return _python("benchmarks.warm", "--device", device, "--minutes", minutes, *processes)

    return Stage("warm", command, WARM_SECONDS, 30.0, r"\d processes", beside=PROOFS)


def _record(name: str, device: str, *dtypes: str) -> Stage:
    """``fused-lm verify`` of what has no record yet; on a CPU of one case."""

    def command(piece: Piece) -> list[str]:
        minutes = max(0.1, (piece.seconds - 10.0) / 60.0)  # it writes its records at the end
        extent = ["--only", *(f" {dtype} " for dtype in dtypes)]
        if device == "cpu":
            extent = ["--limit", "1"]
        where = ["--device", device, "--out", str(piece.folder)]
        return _python("fused_lm", "verify", "--minutes", f"{minutes:.2f}", *where, *extent)

    return Stage(name, command, RECORD_SECONDS, 40.0, r"\d passed", more=MORE)


def _race(name: str, device: str, commit: str, contestants: Sequence[str]) -> Stage:
    def command(piece: Piece) -> list[str]:
        minutes = f"{max(0.1, (piece.seconds - 8.0) / 60.0):.2f}"  # it ends after a case
        out = ["--out", str(piece.folder), "--commit", commit, "--device", device]
        some = ["--contestants", *contestants] if contestants else []
        return _python(f"benchmarks.{name}", "--minutes", minutes, *out, *some)

    seconds = RACE_SECONDS.get(name, OTHERS_SECONDS)
    return Stage(name, command, seconds, 20.0, r"\d cases", SILENCE_SECONDS, MORE)


def _tune(device: str, commit: str) -> Stage:
    def command(piece: Piece) -> list[str]:
        minutes = f"{max(0.1, (piece.seconds - 12.0) / 60.0):.2f}"
        out = ["--out", str(piece.folder), "--commit", commit, "--device", device]
        return _python("benchmarks.tune", "sweep", "--minutes", minutes, *out)

    return Stage("tune", command, TUNE_SECONDS, 40.0, r"\d candidates", SILENCE_SECONDS, MORE)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _no_smi() -> str | None:
    return None if shutil.which("nvidia-smi") else "nvidia-smi is not installed"


def _no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not installed"
    return extension.refusal_on("cuda", 0) if torch.cuda.is_available() else "there is no GPU"
