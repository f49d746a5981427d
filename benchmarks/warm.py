"""What the races' contestants compile at their first call, compiled ahead, several cases at a time:
``python -m benchmarks.warm``. Nothing is timed. What comes of it are the caches on disk of Triton,
torch.compile and CuTe, so that a minute of racing is spent on measuring.

Cases go by worth, the first of every race, then the second. A process that a contestant crashes
loses what it had not reached; the race compiles that itself.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import harness
from .command import use_stand_ins
from .contest import RACES, Case, Contestant

PROCESSES = 8
OVERTIME_SECONDS = 8.0
"""For a step that was begun in time."""
DRY_ENTRIES = 1
"""On a CPU, where nothing is compiled."""


class Entry(NamedTuple):
    """A case of a race, and who compiles for it."""

    race: str
    case: Case
    contestants: Sequence[Contestant]


def entries(dry: bool) -> Iterator[Entry]:
    """The first case of every race, then the second ones."""
    fields = []
    for race in RACES:
        module = importlib.import_module(f"benchmarks.{race}")
        compiling = [c for c in module.CONTESTANTS if c.compiles]
        fields.append([Entry(race, case, compiling) for case in module.grid(dry)])
    by_worth = itertools.zip_longest(*fields)
    found = (entry for together in by_worth for entry in together if entry is not None)
    return itertools.islice(found, DRY_ENTRIES if dry else None)


def warm(share: Sequence[Entry], device: torch.device, end: float) -> int:
    """Steps that were run before the time (time.monotonic); a line for each."""
    steps = 0
    for race, case, contestants in share:
        if time.monotonic() >= end:
            break
        try:
            for name, seconds, problem in harness.first_steps(case, contestants, device):
                steps += problem is None
                print(f"{race}, {case.name}, {name}: {problem or f'{seconds:.1f} s'}", flush=True)
        except torch.OutOfMemoryError:  # beside the others
            print(f"{race}, {case.name}: no memory for its inputs", flush=True)
            torch.cuda.empty_cache()
    return steps


def in_time(commands: Sequence[Sequence[str]], end: float) -> int:
    """Runs all at once, until the time; how many crashed or were stopped then."""
    early = 0
    children = [subprocess.Popen(command) for command in commands]
    for child in children:
        try:
            early += child.wait(max(0.0, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            early += 1
    return early


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--share", type=int, help="of the cases, of one process: 0 is the first")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    end = time.monotonic() + 60.0 * args.minutes
    if args.share is None:
        command = [sys.executable, "-m", "benchmarks.warm", *sys.argv[1:]]
        shares = [[*command, "--share", str(share)] for share in range(args.processes)]
        early = in_time(shares, end + OVERTIME_SECONDS)
        print(f"{args.processes} processes, {early} of them ended early", flush=True)
        return
    device = torch.device(args.device)
    if device.type == "cpu":
        use_stand_ins()
    share = [*entries(device.type == "cpu")][args.share :: args.processes]
    print(f"share {args.share}: {warm(share, device, end)} steps", flush=True)


if __name__ == "__main__":
    main()
