"""The command line that all races share, and what it prints."""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_lm.parity.run import use_interpreter_without_gpu

from .contest import Case, Contestant
from .harness import ContextLost, race


def table(lines: Iterable[dict[str, Any]], contestants: Sequence[Contestant], unit: str) -> str:
    """A row per case and pass, a column per contestant; ``unit`` is "tflops", "tbps" or "us"."""
    names = [contestant.name for contestant in contestants]
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        if unit in line:
            rows.setdefault((line["case"], line["pass"]), {})[line["contestant"]] = line[unit]
    width = max((len(case) for case, _ in rows), default=4)
    text = [f"{unit:{width}} pass " + " ".join(f"{name:>18}" for name in names)]
    for (case, way), found in rows.items():
        cells = (f"{found[name]:18.4g}" if name in found else f"{'-':>18}" for name in names)
        text.append(f"{case:{width}} {way:4} " + " ".join(cells))
    return "\n".join(text)


def problems(lines: Iterable[dict[str, Any]]) -> str:
    """Why there is no number, a row per reason."""
    cases: dict[str, list[str]] = {}
    for line in lines:
        if "problem" in line:
            reason = f"{line.get('contestant', 'all')}: {line['problem']}"
            cases.setdefault(reason, []).append(line["case"])
    return "\n".join(
        f"{reason} ({found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''})"
        for reason, found in cases.items()
    )


def use_stand_ins() -> None:
    """Of a GPU, in a dry run: Triton's interpreter, which kernels are found by being imported."""
    use_interpreter_without_gpu()
    import fused_lm.triton_kernels.attention  # noqa: F401


def device_of(name: str) -> torch.device:
    """The device to race on; on a CPU with stand-ins.

    Raises:
        SystemExit: There is no GPU.
    """
    if name == "cpu":
        use_stand_ins()
    elif not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu is a dry run")
    return torch.device(name)


def head_of(dry: bool, commit: str) -> dict[str, Any]:
    """What every line says of where it is from; a dry run names no GPU."""
    return {
        "gpu": None if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def chosen(contestants: Sequence[Contestant], names: Sequence[str] | None) -> list[Contestant]:
    """All of them, or those with a name; a case that they have run counts as done.

    Raises:
        SystemExit: None has.
    """
    found = [one for one in contestants if names is None or one.name in names]
    if not found:
        raise SystemExit(f"none of these races: {', '.join(one.name for one in contestants)} do")
    return found


def main(
    name: str,
    grid: Callable[[bool], Sequence[Case]],
    contestants: Sequence[Contestant],
    unit: str,
) -> None:
    """The command line of a benchmark; ``grid(dry)`` are its cases, in order of worth."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--out", type=Path, help=f"folder for {name}.jsonl, gone on with if there")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="of these, those it has")
    parser.add_argument("--commit", default="", help="what is written beside the numbers")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    end = time.monotonic() + 60.0 * args.minutes
    contestants = chosen(contestants, args.contestants)
    device = device_of(args.device)
    dry = device.type == "cpu"
    head = head_of(dry, args.commit)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in grid(dry) if args.only in case.name]
    file = args.out / f"{name}.jsonl" if args.out else None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        lines, missed = race(cases, contestants, device, head, file, end)
    except ContextLost as lost:
        raise SystemExit(
            f"{lost} has broken the context: cases go on if you run it again"
        ) from lost
    print(problems(lines))
    print(table(lines, contestants, unit))
    print("a CPU, tiny shapes" if dry else json.dumps(head))
    left = f", {missed} not reached: run it again, it goes on there" if missed else ""
    print(f"{len(cases) - missed} cases{left}")
