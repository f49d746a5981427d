"""The harness' calls (``tests/test_gpu_kernels.py``) on this GPU, plain or under a tool of
compute-sanitizer: ``python -m benchmarks.gpu_calls racecheck --out DIR --minutes 3``.

Some dozens of calls are a process, and some processes run at once. A call that hangs, or crashes
the GPU's context, takes no other with it: the others of its process run again, in another one,
and of a test that did so three times the rest is left out. Run again, it goes on.

DIR then has ``calls.jsonl``, a line per call; ``reports.jsonl``, a line per process: what
compute-sanitizer reported, addresses aside, and how often; and, of a plain run, ``kernels.txt``,
which has every kernel that CUPTI saw.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from .call_outcomes import FAILED, PASSED, SKIPPED
from .call_share import CRASHED, HUNG, PLAIN, SANITIZERS, Share, run_share
from .diary import whole_lines

TESTS = "tests/test_gpu_kernels.py"
CALLS, REPORTS, KERNELS = "calls.jsonl", "reports.jsonl", "kernels.txt"

AT_ONCE, PLAIN_AT_ONCE = 32, 128
"""Calls of a process: torch takes it seconds to load, and what it does is lost if it is cut."""
PROCESSES = 3
LEAST_SECONDS = 20.0
"""With less time no process is begun."""
MOST_CRASHES = 3
"""Calls of a test that crash or hang, after which its others are left out."""
LEFT_OUT = "left out"
FINE = (PASSED, SKIPPED)


class Proof:
    """Of a tool, on disk after every process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes = {
            line["call"]: (line["outcome"], line["said"]) for line in _lines(folder / CALLS)
        }
        self.reports = Counter[str]()
        for line in _lines(folder / REPORTS):
            self.reports.update(line["reports"])
        file = folder / KERNELS
        self.kernels = {*file.read_text().splitlines()} if file.is_file() else set()

    def add(self, share: Share) -> None:
        """Calls last: a kill before them runs them again, and loses nothing."""
        self.kernels |= share.kernels
        if share.kernels:
            text = "".join(f"{name}\n" for name in sorted(self.kernels))
            (self.folder / KERNELS).write_text(text)
        self.reports.update(share.reports)
        self.outcomes.update(share.outcomes)
        if share.summary:
            about = {"calls": len(share.outcomes), "seconds": round(share.seconds, 1)}
            line = {**about, "summary": share.summary, "reports": share.reports}
            _append(self.folder / REPORTS, [line])
        lines = ({"call": c, "outcome": o, "said": s} for c, (o, s) in share.outcomes.items())
        _append(self.folder / CALLS, lines)

    def is_left_out(self, call: str) -> bool:
        """For what others of its test did."""
        lost = [c for c, (o, _) in self.outcomes.items() if o in (HUNG, CRASHED)]
        return sum(test_of(c) == test_of(call) for c in lost) >= MOST_CRASHES

    def words(self) -> Iterator[str]:
        """Each report once, with how often it came, and each call that did not pass."""
        yield from (f"{count} times {report}" for report, count in self.reports.items())
        for call, (outcome, said) in self.outcomes.items():
            if outcome not in (*FINE, LEFT_OUT):
                yield f"{outcome}: {call.partition('::')[2]}: {said}"
        left_out = Counter(test_of(c) for c, (o, _) in self.outcomes.items() if o == LEFT_OUT)
        yield from (f"{LEFT_OUT}: {count} more of {test}" for test, count in left_out.items())

    def sum_up(self) -> str:
        """How many passed, and counts of every other outcome there was."""
        counts = Counter(outcome for outcome, _ in self.outcomes.values())
        others = (FAILED, CRASHED, HUNG, LEFT_OUT, SKIPPED)
        return ", ".join(f"{counts[o]} {o}" for o in (PASSED, *others) if counts[o] or o == PASSED)

    def is_clean(self) -> bool:
        """Whether nothing is wrong so far; where all is skipped, nothing is known."""
        found = {outcome for outcome, _ in self.outcomes.values()}
        return PASSED in found and found <= {*FINE} and not self.reports


def test_of(call: str) -> str:
    """Its name, without parameters."""
    return call.partition("::")[2].partition("[")[0]


def _lines(file: Path) -> list[dict[str, Any]]:
    return list(whole_lines(file)) if file.is_file() else []


def _append(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as out:
        out.write("\n" * torn + "".join(json.dumps(line) + "\n" for line in lines))


def run(tool: str, proof: Proof, calls: Sequence[str], processes: int, end: float) -> int:
    """Calls that are new to the proof, until the time (time.monotonic); how many are left. If none
    is new, those that did not pass.
    """
    if all(call in proof.outcomes for call in calls):
        proof.outcomes = {c: found for c, found in proof.outcomes.items() if found[0] in FINE}
    waiting = [call for call in calls if call not in proof.outcomes]
    running: dict[Future[Share], list[str]] = {}
    most = PLAIN_AT_ONCE if tool == PLAIN else AT_ONCE
    with ThreadPoolExecutor(processes) as pool:
        while True:
            left_out = {c: (LEFT_OUT, "") for c in waiting if proof.is_left_out(c)}
            if left_out:
                proof.add(Share(left_out))
            waiting = [call for call in waiting if call not in left_out]
            while waiting and len(running) < processes and end - time.monotonic() > LEAST_SECONDS:
                share, waiting = waiting[:most], waiting[most:]
                running[pool.submit(run_share, tool, share, end)] = share
            if not running:
                return len(waiting)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                share, result = running.pop(done), done.result()
                proof.add(result)
                print(f"{tool}: {proof.sum_up()}; {result.seconds:.0f} s", flush=True)
                waiting = [*(call for call in share if call not in result.outcomes), *waiting]


def collected(tests: str) -> list[str]:
    """Ids of a file's tests.

    Raises:
        RuntimeError: pytest can't read it.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    process = subprocess.run([*command, tests], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{tests} can't be collected: {process.stdout[-500:]}")
    return [line for line in process.stdout.splitlines() if "::" in line]


def main() -> int:
    """Exit code 1 if something was reported or did not pass; what is left, the next run does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_calls", description=__doc__)
    parser.add_argument("tool", choices=(PLAIN, *SANITIZERS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=PROCESSES, help="at once")
    parser.add_argument("--tests", default=TESTS, metavar="FILE")
    args = parser.parse_args()
    end = time.monotonic() + 60.0 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    proof = Proof(args.out)
    try:
        calls = collected(args.tests)
        left = run(args.tool, proof, calls, args.processes, end)
    except RuntimeError as error:
        print(error)
        return 1
    for word in proof.words():
        print(word)
    reports = f", {sum(proof.reports.values())} reports"
    found = f", {len(proof.kernels)} kernels" if args.tool == PLAIN else reports
    more = f", {left} not reached: run it again, it goes on there" if left else ""
    print(f"{args.tool}, {len(calls)} calls: {proof.sum_up()}{found}{more}", flush=True)
    return int(not proof.is_clean())


if __name__ == "__main__":
    sys.exit(main())
