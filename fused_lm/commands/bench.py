"""``fused-lm bench``: the kernels against PyTorch and whatever else is installed, on this GPU.

The races are the project's ``benchmarks``, which an install holds as ``fused_lm.benchmarks``. Each
runs in a process of its own; where one crashes or says nothing for long, the next one goes on
behind that, as long as there is time.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from fused_lm.commands.doctor import describe_machine
from fused_lm.commands.errors import UserError
from fused_lm.commands.parity import chosen_device
from fused_lm.version import __version__

NAME = "bench"
HELP = "race the kernels against PyTorch and what else is installed, on this GPU"
RACES = ("attention", "layernorm", "loss", "ffn", "block", "train")
DEFAULT_MINUTES = 10.0
SILENCE_SECONDS = 90.0
"""Without a line written: contestants may compile for half a minute and more."""
GRACE_SECONDS = 60.0
"""Beyond its minutes: a case that was begun in time is finished."""
POLL_SECONDS = 0.2
USAGE = 2
"""Exit status of a race that doesn't understand its arguments."""
COLUMNS = (
    *("gpu", "torch", "date", "race", "case", "pass", "contestant", "us", "spread", "tflops"),
    *("tbps", "tokens_per_s", "mj", "host_us", "step_mib", "error", "problem"),
)
PACKAGE = Path(__file__).resolve().parents[1]
AS_A_MODULE = """
import runpy, sys
sys.path[0] = sys.argv.pop(1)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""``python -m``, which finds nothing in the folder that it is called from: argv[1] is that to look
in first, argv[2] the module.
"""


class Place(NamedTuple):
    """Where the races are: their package, and the folder that holds it."""

    package: str
    root: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=RACES, default=RACES, metavar="RACE",
                        help=f"some of {', '.join(RACES)}; all unless given")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time in all")
    parser.add_argument("--out", metavar="DIR", type=Path, help="for results; goes on in one")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="all numbers, a line each")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw them, as PNG and SVG")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a dry run, tiny shapes")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every race ended, else 1.

    Raises:
        UserError: There is no GPU and no ``--device cpu``, no time or no such case, or a file or
            folder can't be written.
    """
    device = chosen_device(args.device)
    if args.device is None and device.type != "cuda":
        raise UserError("there is no GPU; --device cpu is a dry run on tiny shapes")
    if not (0 < args.minutes < math.inf):
        raise UserError("--minutes must be above 0")
    place, races = benchmarks_place(), list(dict.fromkeys(args.op))
    seconds = 60.0 * args.minutes / len(races)
    try:
        out = args.out or Path(tempfile.mkdtemp(prefix="fused_lm_bench_"))
        about = _prepared(out, device.type, args.csv, args.plot)
        print(f"raw results: {out}", flush=True)
        if args.plot:
            _ended(place, "roofs", out, device.type, [], GRACE_SECONDS)
        more = [f"--only={args.only}", f"--commit={about['commit']}"]
        ended = [_race(race, place, out, device.type, more, seconds) for race in races]
        lines = results_of(place, out, races)
        if not lines and all(ended):
            raise UserError(f"no case has {args.only!r} in its name")
        if args.csv:
            write_csv(args.csv, lines)
            print(f"numbers: {args.csv}")
        if args.plot:
            _draw(place, out, about, args.plot)
    except OSError as error:
        raise UserError(f"can't write {error.filename}: {error.strerror}") from error
    if device.type == "cpu":
        print("This was a CPU, on tiny shapes: no number here says anything of a GPU.")
    return 0 if all(ended) else 1


def benchmarks_place() -> Place:
    """Where the races are: in an install, or else in the checkout around this package.

    Raises:
        UserError: In neither.
    """
    root = PACKAGE.parent
    if importlib.util.find_spec("fused_lm.benchmarks") is not None:
        return Place("fused_lm.benchmarks", root)
    if not (root / "benchmarks/contest.py").is_file():
        raise UserError("this install lacks fused_lm.benchmarks: install fused_lm again")
    if str(root) not in sys.path[:1]:
        sys.path.insert(0, str(root))
    return Place("benchmarks", root)


def _prepared(out: Path, device: str, table: Path | None, plots: Path | None) -> dict[str, Any]:
    """The folder, with what its numbers are of; whatever can't be written is told before a race.

    Raises:
        UserError: The folder holds numbers of something else.
        ModuleNotFoundError: Plots are wanted, and matplotlib isn't there.
    """
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.open("a").close()
    if plots is not None:
        importlib.import_module("matplotlib")
        plots.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {
        "device": device,
        "gpu": machine["gpus"][0]["name"] if device == "cuda" else "a CPU",
        "torch": machine["environment"]["torch"],
        "commit": f"{__version__}+{source_hash()}",
        "pieces": [now],
        **machine,
    }
    file = out / "environment.json"
    before = json.loads(file.read_text()) if file.is_file() else about
    for name in ("gpu", "torch", "commit"):
        if before.get(name) != about[name]:
            of = f"{name} {before.get(name)!r}, this is {about[name]!r}"
            raise UserError(f"{out} holds numbers of {of}: give another --out")
    file.write_text(json.dumps(about, indent=1) + "\n")
    return about


def source_hash() -> str:
    """Of all that this package runs: numbers of other kernels are not gone on with."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("_build.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _race(
    race: str, place: Place, out: Path, device: str, more: Sequence[str], seconds: float
) -> bool:
    """Whether it came to its end in time; what it prints is the user's to read."""
    print(f"== {race}", flush=True)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        minutes = [f"--minutes={left / 60.0:.4f}"]
        status = _ended(place, race, out, device, [*more, *minutes], left + GRACE_SECONDS)
        if status in (0, USAGE):
            return status == 0
        how = "said nothing for long" if status is None else f"exit status {status}"
        print(f"{race}: {how}; it goes on behind that", flush=True)
    return False


def _ended(
    place: Place, module: str, out: Path, device: str, more: Sequence[str], seconds: float
) -> int | None:
    """Exit status of a module of the package; None if it was stopped for its silence or time."""
    command = [sys.executable, "-c", AS_A_MODULE, str(place.root), f"{place.package}.{module}"]
    command += ["--out", str(out), "--device", device, *more]
    environment: Mapping[str, str] = os.environ
    if device == "cpu":  # Triton's interpreter is for machines without a GPU
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    begin = time.monotonic()
    heard, written = begin, -1
    with subprocess.Popen(command, env=environment) as process:
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                size = sum(path.stat().st_size for path in out.glob("*.jsonl"))
                if size != written:
                    heard, written = time.monotonic(), size
                now = time.monotonic()
                if now - heard > SILENCE_SECONDS or now - begin > seconds:
                    return None
            return process.returncode
        finally:
            process.kill()


def results_of(place: Place, out: Path, races: Sequence[str]) -> list[dict[str, Any]]:
    """Numbers, and why there is none, with the race that each is of."""
    whole_lines = importlib.import_module(f"{place.package}.diary").whole_lines
    return [
        {**line, "race": race}
        for race in races
        if (out / f"{race}.jsonl").is_file()
        for line in whole_lines(out / f"{race}.jsonl")
        if "event" not in line
    ]


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A line per number, or per reason why there is none.

    Raises:
        OSError: It can't be written.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)


def _draw(place: Place, out: Path, about: dict[str, Any], folder: Path) -> None:
    record = importlib.import_module(f"{place.package}.record")
    plots = importlib.import_module(f"{place.package}.plots")
    if plots.draw_all([record.Record(out, about)], folder):
        print(f"plots: {folder}")
    else:
        print("no race has two cases of a kind yet: nothing to draw")
