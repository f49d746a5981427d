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
import datetime
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fused_lm.parity.timing import interleaved_times, median

from . import cuda_tiles, harness
from .command import use_stand_ins
from .contest import Given
from .record import Line, gpus, records
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
    """A line per candidate, each on disk at once, until the time (time.monotonic)."""
    done = {(line["spot"], _key(line["config"])) for line in _lines(file)}
    for spot in chosen:
        row, others = machine.choices(spot)
        left = [c for c in [row, *others] if (spot.name, _key(c)) not in done]
        left = [c for c in left if c != row] if len(left) > 1 else left
        if not left or time.monotonic() >= end:
            continue
        torch.manual_seed(0)
        given = spot.case.given(machine.device)
        for first in range(0, len(left), TOGETHER):
            if time.monotonic() >= end:
                return
            for line in _timed(spot, given, row, left[first : first + TOGETHER], machine.device):
                line = {**head, "spot": spot.name, "table": spot.table, **line}
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                yield line


def _timed(
    spot: Spot, given: Given, row: Config, configs: Sequence[Config], device: torch.device
) -> Iterator[Line]:
    """The table's row, then the candidates, each by its time and by the row's in the same turns."""
    calls: list[tuple[Config, Callable[[], None], float]] = []
    for config in [row, *(c for c in configs if c != row)]:
        try:
            calls.append((config, *_admitted(spot, given, config)))
        except Exception as error:  # whatever a tile does to the compiler
            yield {"config": config, "problem": " ".join(str(error).split())[:120]}
    if not calls or calls[0][0] != row:
        return
    functions = [call for _, call, _ in calls]
    if device.type == "cuda":
        times = [median(t) for t in interleaved_times(functions, SECONDS * len(calls), least=5)]
    else:
        times = [_host_us(call) for call in functions]
    for (config, _, error), us in zip(calls, times, strict=True):
        yield {
            "config": config, "us": round(us, 1), "ratio": round(us / times[0], 4),
            "row": config == row, "error": float(f"{error:.3g}"),
        }  # fmt: skip


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
    return compiled


def choose(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """(gpu, spot) -> the line of the tile to take there, by the last of several sweeps there: their
    rows may differ. Of a dry run there is none.
    """
    last: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["gpu"]:
            found = last.setdefault((line["gpu"], line["spot"]), [])
            if found and found[0]["commit"] != line["commit"]:
                found.clear()
            found.append(line)
    chosen = {key: best(found).get(key[1]) for key, found in last.items()}
    return {key: line for key, line in chosen.items() if line is not None}


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
    """Spots where a table has another tile than the sweeps of a GPU choose, a sentence each."""
    from fused_lm.triton_kernels.launch import shared_memory_limit

    from .tiles import row_of, spots

    found, known = [], {spot.name: spot for spot in spots(False)}
    shapes = {record.gpu: record for record in records()}
    for (gpu, name), line in sorted(choose(lines).items(), key=lambda item: item[0]):
        about = shapes[gpu].about["gpus"][0] if gpu in shapes else None
        if name in known and about is not None:
            arch = int(about["capability"].replace(".", ""))
            row = row_of(known[name], shared_memory_limit(arch), about["multiprocessors"])
            if row != line["config"]:
                ratio = f"{line['ratio']:.2f} of its row's time then"
                found.append(f"{gpu}, {name}: {line['config']} ({ratio}), the table has {row}")
    return found


def _lines(path: Path) -> list[Line]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


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
    head = {
        "gpu": None if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": args.commit,
        "date": datetime.date.today().isoformat(),
    }
    lines = list(sweep(chosen, machine, head, args.out / FILE, begin + seconds))
    for name, line in best(lines).items():
        print(f"{name}: {line['config']}, {line['ratio']:.3f} of the row's time")
    tried = {(line["spot"], _key(line["config"])) for line in _lines(args.out / FILE)}
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
