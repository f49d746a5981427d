"""``fused-lm verify``: proves and times every kernel on this GPU and writes the record dispatch
reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fused_lm import records
from fused_lm.commands.doctor import describe_machine
from fused_lm.commands.errors import UserError
from fused_lm.commands.parity import chosen_device
from fused_lm.parity.run import NOT_MEASURED

NAME = "verify"
HELP = "prove and time every kernel on this GPU, and let auto use those that win"
DEFAULT_MINUTES = 3.0
JOB_SECONDS = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time in all")
    parser.add_argument("--device", help="cuda or cpu (a dry run on tiny shapes, writes no record)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the raw results here")
    parser.add_argument("--again", action="store_true", help="also what has a record already")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N jobs")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every finished job passed parity, else 1."""
    from rich.console import Console

    from fused_lm.parity.supervise import supervise
    from fused_lm.parity.worker import jobs_for

    device = chosen_device(args.device)
    console = Console(highlight=False)
    jobs = jobs_for(device)[: args.limit]
    if not jobs or args.minutes <= 0:
        raise UserError("nothing to verify: --limit and --minutes must be above 0")
    out = _prepared_folder(args.out, device)
    where = "kernels in the interpreter" if device.type == "cpu" else _gpu_name(device)
    minutes = f"at most {args.minutes:g} minutes"
    console.print(f"verify: {len(jobs)} jobs on {device} ({where}), {minutes}")
    found: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        found.append({**_labels(jobs, result, device), **result})
        console.print(_line(jobs, result))

    worker = [sys.executable, "-m", "fused_lm.parity.worker", "--device", str(device)]
    if args.again:
        worker.append("--again")
    try:
        supervise(
            [*worker, "--stop", str(len(jobs))],
            len(jobs),
            out / "results.jsonl",
            JOB_SECONDS,
            args.minutes * 60.0,
            keep,
        )
    finally:  # what was proven before a Ctrl-C is proven
        if device.type == "cuda":
            written = _merge(records_of(found))
            console.print(f"{written} records in {records.user_file()}; auto uses them from now on")
    failed = [result for result in found if result["problem"] is not None]
    console.print(f"{len(found) - len(failed)} passed, {len(failed)} failed", end="")
    left = len(jobs) - len(found)
    console.print(f", {left} not reached: run it again, it goes on there" if left else "")
    console.print(f"raw results: {out}")
    if device.type == "cpu":
        console.print("This was a CPU: no record is written.")
    return 1 if failed else 0


def _prepared_folder(chosen: Path | None, device: torch.device) -> Path:
    """The folder for raw results, with a description of the machine in it."""
    out = chosen or Path(tempfile.mkdtemp(prefix="fused_lm_verify_"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        description = {"device": str(device), **describe_machine()}
        (out / "environment.json").write_text(json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from error
    return out


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _labels(jobs: list[Any], result: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a job that was lost is about: its kernel must not be trusted by extrapolation."""
    if "op" in result or device.type != "cuda":
        return {}
    from fused_lm.parity.worker import labels_of

    return {**labels_of(jobs[result["job"]], device), "parity": False}


def records_of(results: list[dict[str, Any]]) -> list[records.Record]:
    """The records that raw results of a GPU prove; parity failures are recorded too."""
    made = []
    for result in results:
        if "gpu" not in result or result.get("worst") == NOT_MEASURED or result.get("skipped"):
            continue
        for mode in ("infer", "train"):
            ratio = result.get("times", {}).get(mode, {}).get("ratio", 0.0)
            made.append(
                records.Record(
                    result["op"],
                    result["backend"],
                    result["kernel"],
                    result["gpu"],
                    mode,
                    result["dtype"],
                    result["family"],
                    result["size"],
                    bool(result["parity"]),
                    round(ratio, 3),
                )
            )
    return made


def _merge(new: list[records.Record]) -> int:
    """New records replace old ones of the same kernel, GPU and class; of two sizes, the worse
    stays.
    """
    path = records.user_file()
    try:
        old = records.load(path) if path.is_file() else []
    except ValueError as error:
        print(f"replaced: {error}", file=sys.stderr)
        old = []
    fresh: dict[tuple[Any, ...], records.Record] = {}
    for record in new:
        key = (*records.key_of(record), record.size)
        other = fresh.get(key)
        if other is None or (record.parity, record.ratio) < (other.parity, other.ratio):
            fresh[key] = record
    merged = {(*records.key_of(record), record.size): record for record in old}
    merged.update(fresh)
    try:
        records.save(path, merged.values())
    except OSError as error:
        raise UserError(f"can't write the record {path}: {error.strerror}") from error
    return len(fresh)


def _line(jobs: list[Any], result: dict[str, Any]) -> str:
    from rich.markup import escape

    name = jobs[result["job"]].name
    if result["problem"] is not None:
        return f"[red]FAIL[/] {name}: {escape(result['problem'])}"
    if result.get("skipped"):
        return f"[dim]known[/] {name}"
    ratios = {mode: times["ratio"] for mode, times in result.get("times", {}).items()}
    speed = ", ".join(f"{mode} {ratio:.2f}x" for mode, ratio in ratios.items())
    return f"[green]ok[/]   {name}" + (f": {speed} of PyTorch's speed" if speed else "")
