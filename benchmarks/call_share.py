"""Some of the harness' calls in one process, plain or under a tool of compute-sanitizer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .call_outcomes import BEGUN, FAILED
from .diary import whole_lines

PLAIN = "plain"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SILENCE_SECONDS = 90.0
"""After so long a call counts as hung: a start takes ten, a call under racecheck two."""

HUNG, CRASHED = "hung", "crashed"
REPORTED = 9
"""The exit status that compute-sanitizer is asked for, when it has reported something."""
REPORT = re.compile(r"(Error: |Uninitialized |Invalid |Barrier error |Program hit ).*")
SUMMARY = re.compile(r"\w+ SUMMARY: .*")
ADDRESS = re.compile(r"\+?0x[0-9a-f]+")
LOST_CONTEXT = re.compile(r"CUDA (driver )?error")
"""In the message of a test: every later one of its process fails too."""


@dataclass
class Share:
    """What came of them. Calls without an outcome are to run again."""

    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)  # and what it said
    kernels: set[str] = field(default_factory=set)
    reports: Counter[str] = field(default_factory=Counter)
    summary: str = ""
    seconds: float = 0.0


def run_share(tool: str, calls: Sequence[str], end: float) -> Share:
    """Calls by their ids, until they have ended, one has hung, or the clock says ``end``.

    Raises:
        RuntimeError: pytest or compute-sanitizer doesn't work here.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        outcomes, kernels, log = (Path(temporary) / name for name in ("outcomes", "kernels", "log"))
        # Without PyTorch's cache of memory, which would hide what is out of bounds or unwritten.
        sanitized = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FUSED_LM_TEST_REPEATS": "1"}
        plain = {"FUSED_LM_TEST_KERNELS": str(kernels)}
        environment = {"OMP_NUM_THREADS": "2", **(plain if tool == PLAIN else sanitized)}
        command = [*_tool(tool, log), *_pytest(outcomes, calls)]
        code = _wait(command, environment, outcomes, end)
        ended, begun = _read(outcomes)
        ran = {*kernels.read_text().splitlines()} if kernels.is_file() else set()
        text = log.read_text(errors="replace") if log.is_file() else ""
    found = Share(kernels=ran, seconds=time.monotonic() - begin)
    if code is None and time.monotonic() >= end:
        return found  # not its own fault
    died = code is None or code < 0 or bool(begun)
    last = [*ended, *begun][-1:]
    found.outcomes = {call: _death(code) for call in last} if died else _that_count(ended)
    summaries = SUMMARY.findall(text)
    if not found.outcomes or (tool != PLAIN and not died and not summaries):
        raise RuntimeError(f"{tool}, exit status {code}: {(text.splitlines() or ['no word'])[-1]}")
    if tool != PLAIN:
        found.summary = summaries[-1] if summaries else "none"
        lines = (REPORT.search(line) for line in text.splitlines())
        found.reports.update(ADDRESS.sub("", line[0])[:200] for line in lines if line)
        if code == REPORTED and not found.reports:
            found.reports[found.summary] += 1
    return found


def _death(code: int | None) -> tuple[str, str]:
    if code is None:
        return HUNG, f"no end within {SILENCE_SECONDS:.0f} s"
    return CRASHED, signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _that_count(ended: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Up to the first that lost the GPU's context; what came later says nothing."""
    found = {}
    for call, (outcome, said) in ended.items():
        if outcome == FAILED and LOST_CONTEXT.search(said):
            return {**found, call: (CRASHED, said)}
        found[call] = (outcome, said)
    return found


def _read(file: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Tests that have ended, each with its outcome and words, and those that only began."""
    ended: dict[str, tuple[str, str]] = {}
    begun: dict[str, None] = {}
    for line in whole_lines(file) if file.is_file() else ():
        call, outcome = line["call"], line["outcome"]
        if outcome == BEGUN:
            begun[call] = None
        elif ended.get(call, ("",))[0] != FAILED:  # a test may pass and what follows it fail
            ended[call] = outcome, line["said"]
    return ended, [call for call in begun if call not in ended]


def _tool(tool: str, log: Path) -> list[str]:
    if tool == PLAIN:
        return []
    errors_alone = ["--print-level", "error"] if tool == "racecheck" else []
    # PyTorch's kernels copy what isn't dense, and initcheck has to see them write.
    ours = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=fused_lm"]
    exit_code = ["--error-exitcode", str(REPORTED)]
    command = ["compute-sanitizer", "--tool", tool, "--log-file", str(log)]
    return [*command, *exit_code, *ours, *errors_alone]


def _pytest(outcomes: Path, calls: Sequence[str]) -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.call_outcomes"]
    pytest = [sys.executable, "-m", "pytest", "-q", *plugins]
    return [*pytest, f"--outcomes={outcomes}", *calls]  # a word of its own would move the rootdir


def _wait(
    command: Sequence[str], environment: Mapping[str, str], outcomes: Path, end: float
) -> int | None:
    """Its exit status; None if it was stopped, by the clock or for its silence."""
    outcomes.touch()
    everything = {**os.environ, **environment}
    process = subprocess.Popen(command, env=everything, stdin=subprocess.DEVNULL)
    try:
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, min(0.5, end - time.monotonic())))
            if time.time() - outcomes.stat().st_mtime > SILENCE_SECONDS:
                break
        return None
    finally:
        for pid in _family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """A process and all that it has started. They stay in the group of the suite's stage, with
    which they are to end, so that no signal to a group of their own can reach them.
    """
    found = [pid]
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                found += _family(int(child))
    return found
