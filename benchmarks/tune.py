"""Tiles of the Triton kernels by measurement, instead of by the model that their tables began with.

``python -m benchmarks.tune sweep --out DIR`` tries tiles on a GPU: a spot is one kernel in one call
(its operator, shape and pass); each candidate takes the place of the table's row there, in a race
with that row (:mod:`benchmarks.tiles`). Compiling comes first, in several processes.

``python -m benchmarks.tune choose`` reads the sweeps of the records and says where a table has
another tile than they choose (:mod:`benchmarks.tune_choice`); a test holds the tables against it.
Rows of the CUDA kernels stand beside their own sweeps (:mod:`benchmarks.cuda_tiles`).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import cuda_tiles, harness
from .command import device_of, head_of
from .record import Line, Record, gpus, records
from .tune_choice import Key, best, key_of, standing, together
from .warm import Entry, in_time, warm

FILE = "tune.jsonl"
PROCESSES, OVERTIME_SECONDS = 12, 10.0
SLOW_TO_COMPILE = 0.5
"""Share of the minutes that compiling may take."""


def recorded() -> list[Line]:
    """Every line of every sweep in the records."""
    return [line for record in records() for line in record.lines("tune")]


def disagreements(lines: Sequence[Line]) -> list[str]:
    """Rows of the tables that the sweeps of a GPU choose against, a sentence each."""
    from fused_lm.triton_kernels.launch import shared_memory_limit

    from .tiles import row_of, spots

    swept = standing(lines)
    by_row: dict[tuple[str, str, str, Key], list[str]] = {}
    for gpu in {gpu for gpu, _ in swept}:
        about = next(r.about["gpus"][0] for r in reversed(records()) if _tells(r, gpu))
        limit = shared_memory_limit(int(about["capability"].replace(".", "")))
        for spot in spots(False):
            if (gpu, spot.name) in swept:
                row = key_of(row_of(spot, limit, about["multiprocessors"]))
                by_row.setdefault((gpu, spot.table, spot.kernel, row), []).append(spot.name)
    found = []
    for (gpu, table, kernel, row), names in sorted(by_row.items()):
        tile = best(together([swept[gpu, name] for name in names]))
        if tile.config != row:
            told = f"{dict(tile.config)} ({tile.ratio:.2f} of its row's time then)"
            found.append(f"{gpu}, {table} {kernel}: {told}, the table has {dict(row)}")
    return found


def _tells(record: Record, gpu: str) -> bool:
    return record.gpu == gpu and bool(record.about.get("gpus"))


def _sweep(args: argparse.Namespace) -> None:
    device = device_of(args.device)
    from .tiles import Machine, batches, spots  # after Triton's interpreter is chosen

    begin, seconds = time.monotonic(), 60.0 * args.minutes
    dry, machine = device.type == "cpu", Machine.here(device)
    chosen = [spot for spot in spots(dry) if args.only in spot.name]
    races = [race for spot in chosen for race in batches(spot, machine)]
    compile_end = begin + SLOW_TO_COMPILE * seconds
    if args.share is not None:
        own = races[args.share :: args.processes]
        warm([Entry("tune", *race) for race in own], device, compile_end)
        return
    if not dry:
        command = [sys.executable, "-m", f"{__package__}.tune", *sys.argv[1:], "--share"]
        shares = [[*command, str(share)] for share in range(args.processes)]
        in_time(shares, compile_end + OVERTIME_SECONDS)
    args.out.mkdir(parents=True, exist_ok=True)
    head, tried, missed = head_of(dry, args.commit), 0, 0
    for batch, tiles in races:
        try:
            lines, left = harness.race(
                [batch], tiles, device, head, args.out / FILE, begin + seconds
            )
        except harness.ContextLost as lost:
            raise SystemExit(f"{lost} has broken the context: run it again") from lost
        tried, missed = tried + len(lines), missed + left
    more = f", {missed} batches not reached: run it again, it goes on there" if missed else ""
    print(f"{tried} candidates{more}")


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
        print(f"{gpu}: {sum(line['gpu'] == gpu for line in lines)} lines of sweeps")
    print("\n".join(disagreements(lines)) or "the tables have what they choose")
    print(cuda_tiles.report(records()))


if __name__ == "__main__":
    main()
