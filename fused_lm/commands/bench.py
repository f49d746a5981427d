"""``fused-lm bench``: the kernels against PyTorch and whatever else is installed, on this GPU.

The races are the project's ``benchmarks``, which an install holds as ``fused_lm.benchmarks``. Each
runs in a process of its own; where one crashes or hangs, the next one goes on behind that.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fused_lm.commands.doctor import describe_machine
from fused_lm.commands.errors import UserError
from fused_lm.commands.parity import chosen_device
from fused_lm.version import __version__

NAME = "bench"
HELP = "race the kernels against PyTorch and what else is installed, on this GPU"
RACES = ("attention", "layernorm", "loss", "ffn", "block", "train")
DEFAULT_MINUTES = 10.0
MOST_STARTS = 4
"""Of one race, whose process crashed or hung."""
GRACE_SECONDS = 90.0
"""Beyond its minutes: a case that was begun in time is finished."""
COLUMNS = (
    *("gpu", "torch", "date", "race", "case", "pass", "contestant", "us", "spread", "tflops"),
    *("tbps", "tokens_per_s", "mj", "host_us", "step_mib", "error", "problem"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=RACES, default=RACES, metavar="RACE",
                        help=f"some of {', '.join(RACES)}; all unless given")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time in all")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="for results; gone on with if there"
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="all numbers, a line each")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw them, as PNG and SVG")
    parser.add_argument("--device", help="cuda or cpu (a dry run on tiny shapes)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every race ended, else 1.

    Raises:
        UserError: There is no GPU and no ``--device cpu``, no time, or a folder can't be written.
    """
    device = chosen_device(args.device)
    if args.device is None and device.type != "cuda":
        raise UserError("there is no GPU; --device cpu is a dry run on tiny shapes")
    if args.minutes <= 0:
        raise UserError("--minutes must be above 0")
    package, environment = benchmarks_package()
    try:
        out = args.out or Path(tempfile.mkdtemp(prefix="fused_lm_bench_"))
        about = _prepared(out, device.type)
        if args.plot:
            roofs = [sys.executable, "-m", f"{package}.roofs", "--out", str(out)]
            subprocess.run([*roofs, "--device", device.type], env=environment, check=False)
        ended = [
            _race(race, package, out, device.type, args.only, 60.0 * args.minutes / len(args.op),
                  environment)
            for race in args.op
        ]  # fmt: skip
        if args.csv:
            write_csv(args.csv, out, args.op)
            print(f"numbers: {args.csv}")
        if args.plot:
            _draw(package, out, about, args.plot)
            print(f"plots: {args.plot}")
    except OSError as error:
        raise UserError(f"can't write {error.filename}: {error.strerror}") from error
    print(f"raw results: {out}")
    if device.type == "cpu":
        print("This was a CPU, on tiny shapes: no number here says anything of a GPU.")
    return 0 if all(ended) else 1


def benchmarks_package() -> tuple[str, dict[str, str]]:
    """Name of the package that holds the races, and the environment in which it is found: of an
    install, or else of the checkout around this package.

    Raises:
        UserError: It is in neither.
    """
    if importlib.util.find_spec("fused_lm.benchmarks") is not None:
        return "fused_lm.benchmarks", dict(os.environ)
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks/contest.py").is_file():
        raise UserError("this install lacks fused_lm.benchmarks: install fused_lm again")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return "benchmarks", {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _prepared(out: Path, device: str) -> dict[str, Any]:
    """The folder, with what its numbers are of."""
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    gpu = machine["gpus"][0]["name"] if device == "cuda" else "a CPU"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"device": device, "gpu": gpu, "commit": __version__, "pieces": [now], **machine}
    (out / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def _race(
    race: str,
    package: str,
    out: Path,
    device: str,
    only: str,
    seconds: float,
    environment: dict[str, str],
) -> bool:
    """Whether it came to its end in time; what it prints is the user's to read."""
    print(f"== {race}", flush=True)
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", f"{package}.{race}", "--out", str(out), "--device", device]
    command += ["--only", only, "--commit", __version__]
    for _ in range(MOST_STARTS):
        left = max(0.1, end - time.monotonic())
        try:
            done = subprocess.run(
                [*command, "--minutes", f"{left / 60.0:.3f}"],
                env=environment,
                timeout=left + GRACE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{race}: no end within its time; who hung is left out", flush=True)
            continue
        if done.returncode == 0:
            return True
        print(f"{race}: exit status {done.returncode}; it goes on behind that", flush=True)
    return False


def write_csv(path: Path, out: Path, races: Sequence[str]) -> None:
    """Every number, and why there is none, a line each.

    Raises:
        OSError: It can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for race in races:
            for line in _lines(out / f"{race}.jsonl"):
                if "event" not in line:
                    writer.writerow({**line, "race": race})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def _draw(package: str, out: Path, about: dict[str, Any], folder: Path) -> None:
    record = importlib.import_module(f"{package}.record")
    plots = importlib.import_module(f"{package}.plots")
    if not plots.draw_all([record.Record(out, about)], folder):
        print("no race has two cases of a kind yet: nothing to draw")
