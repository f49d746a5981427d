"""Tiles of the Triton kernels by measurement, instead of by the model that their tables began with.

``python -m benchmarks.tune sweep --out DIR`` tries tiles on a GPU: a spot is one kernel in one call
(its operator, shape and pass); each candidate takes the place of the table's row there, has to pass
the gate, and is timed beside that row, in turns. A line per candidate goes to ``tune.jsonl``; a
sweep that was cut goes on behind what it has. Compiling comes first, in several processes.

``python -m benchmarks.tune choose`` reads the sweeps of the records and says per GPU and spot which
tile wins: the table's row, unless another one is faster by more than the noise. It depends on the
lines alone, so that everybody chooses the same; a test holds the tables against it. Rows of the
CUDA kernels stand beside their own sweeps (:mod:`benchmarks.cuda_tiles`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_lm.parity.timing import interleaved_times, median

from . import cuda_tiles, harness
from .command import head_of, use_stand_ins
from .contest import Given
from .diary import whole_lines
from .record import Line, Record, gpus, records
from .warm import in_time

if TYPE_CHECKING:  # imported where a dry run has chosen Triton's interpreter
    from .tiles import Config, Machine, Spot

FILE = "tune.jsonl"
NOISE = 0.03
"""Of a ratio of two times that were taken in turns."""
TOGETHER = 6
"""Candidates that are timed in one go, beside the table's row."""
SECONDS = 0.04
"""Of the GPU, for one candidate."""
PROCESSES, OVERTIME_SECONDS = 12, 10.0
SLOW_TO_COMPILE = 0.5
"""Share of the minutes that compiling may take."""


def sweep(
    chosen: Iterable[Spot], machine: Machine, head: Line, file: Path, end: float
) -> Iterator[Line]:
    """A line per candidate, each on disk at once, until the time (time.monotonic). A tile that a
    process ended in is written off by the next one.

    Raises:
        ContextLost: A tile has broken the GPU's context, and with it this process.
    """
    journal = _Journal(file, head)
    yield from journal.write_off()
    for spot in chosen:
        row, others = machine.choices(spot)
        left = [config for config in others if not journal.has(spot, config)]
        left = left or [config for config in [row] if not journal.has(spot, config)]
        if not left or time.monotonic() >= end:
            continue
        torch.manual_seed(0)
        given = spot.case.given(machine.device)
        for first in range(0, len(left), TOGETHER):
            if time.monotonic() >= end:
                return
            together = [row, *(c for c in left[first : first + TOGETHER] if c != row)]
            yield from _timed(spot, given, row, together, machine.device, journal)


class _Journal:
    """The file of a sweep: results, and between them what a process was at."""

    def __init__(self, file: Path, head: Line) -> None:
        self.file, self.head = file, head
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            with file.open("a") as out:
                out.write("\n")  # behind a torn line
        self.lines = _lines(file)

    def write(self, line: Line) -> Line:
        line = {**self.head, **line}
        self.lines.append(line)
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return line

    def at(self, spot: Spot, config: Config | None) -> None:
        """That a tile's first call begins; None: that times are taken of all that passed."""
        self.write({"spot": spot.name, "config": config, "event": BEGUN if config else TIMES})

    def has(self, spot: Spot, config: Config) -> bool:
        return any(
            line["config"] == config and line["spot"] == spot.name
            for line in self.lines
            if "event" not in line
        )

    def write_off(self) -> list[Line]:
        """What the process before this one ended in, unless it was cut."""
        blamed: list[Line] = []
        for line in self.lines:
            if line.get("event") == BEGUN:
                blamed = [*blamed, line]
            elif "event" not in line:
                blamed = [one for one in blamed if one["config"] != line["config"]]
            elif line["event"] == CUT:
                blamed = []
        if not blamed:
            return []
        ended_in_times = self.lines[-1].get("event") == TIMES
        # The first that was begun together with others is the table's row.
        guilty = blamed[1:] if ended_in_times else blamed[-1:]
        kept = [{k: line[k] for k in ("spot", "config")} for line in guilty]
        written = [self.write({**line, "problem": "hung or crashed"}) for line in kept]
        self.write({"event": CUT, "spot": "", "config": None})  # the others are innocent
        return written


BEGUN, TIMES, CUT = "begun", "times", "cut"


def _timed(
    spot: Spot,
    given: Given,
    row: Config,
    configs: Sequence[Config],
    device: torch.device,
    journal: _Journal,
) -> Iterator[Line]:
    """Each by its time, and by that of the first that passed: the table's row, if it did."""
    calls: list[tuple[Config, Callable[[], None], float]] = []
    about = {"spot": spot.name, "table": spot.table}
    for config in configs:
        journal.at(spot, config)
        try:
            calls.append((config, *_admitted(spot, given, config)))
        except Exception as error:  # whatever a tile does to the compiler
            problem = " ".join(str(error).split())[:120]
            yield journal.write({**about, "config": config, "problem": problem})
            if not harness.context_lives(device):
                raise harness.ContextLost(str(config)) from error
    if not calls:
        return
    journal.at(spot, None)
    functions = [call for _, call, _ in calls]
    if device.type == "cuda":
        times = [median(t) for t in interleaved_times(functions, SECONDS * len(calls), least=5)]
    else:
        times = [_host_us(call) for call in functions]
    for (config, _, error), us in zip(calls, times, strict=True):
        yield journal.write({
            **about, "config": config, "us": round(us, 1), "ratio": round(us / times[0], 4),
            "row": config == row, "error": float(f"{error:.3g}"),
        })  # fmt: skip


def _admitted(spot: Spot, given: Given, config: Config) -> tuple[Callable[[], None], float]:
    """A call with the tile, and its error.

    Raises:
        ValueError: It is wrong. Others: whatever compiling or running it raises.
    """
    from .tiles import using

    run = spot.run(given)
    with using(spot, config):
        out = run()
        gradients = torch.autograd.grad(out, given.leaves, given.dout, retain_graph=True)
        assert given.error is not None
        error = given.error((out.detach(), *gradients))
        if not error <= harness.MOST_ERROR:
            raise ValueError(f"error {error:.3g}, allowed {harness.MOST_ERROR:g}")
        inner = harness.WAYS[spot.way](run, out, given)
        inner()

    def call() -> None:
        with using(spot, config):
            inner()

    return call, error


def _host_us(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def compile_ahead(
    chosen: Sequence[Spot], machine: Machine, share: int, shares: int, end: float
) -> int:
    """Runs a share of the candidates once, for the cache on disk; returns how many."""
    compiled = 0
    for spot in chosen:
        given = spot.case.given(machine.device)
        row, others = machine.choices(spot)
        for config in [row, *others][share::shares]:
            if time.monotonic() >= end:
                return compiled
            with contextlib.suppress(Exception):
                _admitted(spot, given, config)
                compiled += 1
                print(f"compiled: {spot.name}, {config}", flush=True)
    return compiled


def choose(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """(gpu, spot) -> the line of the tile to take there; of a dry run there is none. Of several
    sweeps, whose rows may differ, the last one that has timed what those before it chose.
    """
    sweeps: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in lines:
        if line["gpu"] and "ratio" in line:
            of_spot = sweeps.setdefault((line["gpu"], line["spot"]), {})
            of_spot.setdefault(line["commit"], []).append(line)
    chosen: dict[tuple[str, str], Line] = {}
    for key, by_commit in sweeps.items():
        for found in by_commit.values():
            before = chosen.get(key)
            if before is None or any(line["config"] == before["config"] for line in found):
                chosen[key] = best(found)[key[1]]
    return chosen


def best(lines: Iterable[Line]) -> dict[str, Line]:
    """Spot -> the table's row of the sweep, unless another tile is faster by more than the noise:
    then the fastest, of equal ones the first by its numbers.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if "ratio" in line:
            groups.setdefault(line["spot"], []).append(line)
    chosen = {}
    for spot, found in groups.items():
        fastest = min(found, key=lambda line: (line["ratio"], _key(line["config"])))
        rows = [line for line in found if line["row"]]
        chosen[spot] = rows[0] if rows and fastest["ratio"] > 1.0 - NOISE else fastest
    return chosen


def _key(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(config.items()))


def recorded() -> list[Line]:
    """Every line of every sweep in the records."""
    return [line for record in records() for line in record.lines("tune")]


def disagreements(lines: Sequence[Line]) -> list[str]:
    """Rows of the tables that the sweeps of a GPU choose against, a sentence each.

    Several spots may have one row: then a tile is chosen for all of them, by the geometric mean of
    its ratios where it was tried in all.
    """
    from fused_lm.triton_kernels.launch import shared_memory_limit

    from .tiles import row_of, spots

    lines = list(lines)
    by_row: dict[tuple[Any, ...], list[str]] = {}
    for gpu in {gpu for gpu, _ in choose(lines)}:
        about = next(r.about["gpus"][0] for r in reversed(records()) if _tells(r, gpu))
        limit = shared_memory_limit(int(about["capability"].replace(".", "")))
        for spot in spots(False):
            row = row_of(spot, limit, about["multiprocessors"])
            key = gpu, spot.table, spot.kernel, _key(row)
            by_row.setdefault(key, []).append(spot.name)
    found = []
    for (gpu, table, kernel, row), names in sorted(by_row.items()):
        tile, ratio = _of_all(gpu, names, lines)
        if tile and tile != row:
            told = f"{dict(tile)} ({ratio:.2f} of its row's time then)"
            found.append(f"{gpu}, {table} {kernel}: {told}, the table has {dict(row)}")
    return found


def _tells(record: Record, gpu: str) -> bool:
    return record.gpu == gpu and bool(record.about.get("gpus"))


def _of_all(gpu: str, names: Sequence[str], lines: Sequence[Line]) -> tuple[Any, float]:
    """The tile for spots that share a row, and its mean ratio; nothing if none was swept."""
    chosen = choose(lines)
    swept = [name for name in names if (gpu, name) in chosen]
    if not swept:
        return None, 1.0
    merged: dict[Any, list[float]] = {}
    rows = set()
    for name in swept:
        commit = chosen[gpu, name]["commit"]
        ratios: dict[Any, float] = {}
        for line in lines:
            here = (line["gpu"], line["spot"], line.get("commit")) == (gpu, name, commit)
            if here and "ratio" in line:
                key = _key(line["config"])
                ratios[key] = min(line["ratio"], ratios.get(key, math.inf))
                rows |= {key} if line["row"] else set()
        for key, ratio in ratios.items():
            merged.setdefault(key, []).append(ratio)
    means = {
        key: math.exp(sum(map(math.log, found)) / len(found))
        for key, found in merged.items()
        if len(found) == len(swept)
    }
    fastest = min(means, key=lambda key: (means[key], key))
    kept = [key for key in means if key in rows]
    if kept and means[fastest] > 1.0 - NOISE:
        return kept[0], means[kept[0]]
    return fastest, means[fastest]


def _lines(path: Path) -> list[Line]:
    return list(whole_lines(path)) if path.is_file() else []


def _sweep(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    dry = device.type == "cpu"
    if dry:
        use_stand_ins()
    elif not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu is a dry run")
    from .tiles import Machine, spots

    begin, seconds = time.monotonic(), 60.0 * args.minutes
    machine = Machine.here(device)
    chosen = [spot for spot in spots(dry) if args.only in spot.name]
    compile_end = begin + SLOW_TO_COMPILE * seconds
    if args.share is not None:
        print(compile_ahead(chosen, machine, args.share, args.processes, compile_end))
        return
    if not dry:
        own = [sys.executable, "-m", f"{__package__}.tune", *sys.argv[1:], "--share"]
        shares = [[*own, str(share)] for share in range(args.processes)]
        in_time(shares, compile_end + OVERTIME_SECONDS)
    args.out.mkdir(parents=True, exist_ok=True)
    head = head_of(dry, args.commit)
    file = args.out / FILE
    try:
        lines = list(sweep(chosen, machine, head, file, begin + seconds))
    except SystemExit:
        _Journal(file, head).write({"event": CUT, "spot": "", "config": None})
        raise
    except harness.ContextLost as lost:
        raise SystemExit(f"{lost} has broken the context: it goes on if you run it again") from lost
    for name, line in best(lines).items():
        print(f"{name}: {line['config']}, {line['ratio']:.3f} of the row's time")
    told = [line for line in _lines(file) if "event" not in line]
    tried = {(line["spot"], _key(line["config"])) for line in told}
    wanted = ((spot.name, _key(c)) for spot in chosen for c in machine.choices(spot)[1])
    left = sum(one not in tried for one in wanted)
    more = f", {left} not reached: run it again, it goes on there" if left else ""
    print(f"{len(lines)} candidates{more}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("sweep", help="try tiles on this GPU")
    runs.add_argument("--out", type=Path, required=True, help=f"folder for {FILE}")
    runs.add_argument("--minutes", type=float, default=5.0)
    runs.add_argument("--only", default="", help="spots with this in their names")
    runs.add_argument("--processes", type=int, default=PROCESSES, help="that compile")
    runs.add_argument("--share", type=int, help="of compiling, of one process")
    runs.add_argument("--commit", default="", help="what is written beside the numbers")
    runs.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    commands.add_parser("choose", help="which tiles the recorded sweeps choose")
    args = parser.parse_args()
    if args.command == "sweep":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        _sweep(args)
        return
    lines = recorded()
    for gpu in gpus(records()):
        swept = [line for line in lines if line["gpu"] == gpu]
        print(f"{gpu}: {len(swept)} candidates tried")
    print("\n".join(disagreements(lines)) or "the tables have what they choose")
    print(cuda_tiles.report(records()))


if __name__ == "__main__":
    main()
