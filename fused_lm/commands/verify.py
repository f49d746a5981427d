"""``fused-lm verify``: proves and times every kernel on this GPU and writes the record dispatch
reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_lm import records
from fused_lm.commands.doctor import describe_machine
from fused_lm.commands.errors import UserError
from fused_lm.commands.parity import chosen_device
from fused_lm.parity.lanes import lane_count, prove, run_lanes
from fused_lm.parity.run import NOT_MEASURED

NAME = "verify"
HELP = "prove and time every kernel on this GPU, and let auto use those that win"
DEFAULT_MINUTES = 5.0
JOB_SECONDS = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time in all")
    parser.add_argument("--device", help="cuda or cpu (a dry run on tiny shapes, writes no record)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the raw results here")
    parser.add_argument("--again", action="store_true", help="also what has a record already")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N jobs")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help='only jobs with any of these in "op case dtype backend"',
    )
    parser.add_argument("--parity-only", action="store_true", help="take no times")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every finished job passed parity and could be timed, else 1."""
    from rich.console import Console

    from fused_lm.parity.worker import has_record, jobs_for, labels_of

    device = chosen_device(args.device)
    console = Console(highlight=False)
    jobs = jobs_for(device)
    words = args.only or [""]
    chosen = [i for i, job in enumerate(jobs) if any(word in job.name for word in words)]
    chosen = chosen[: args.limit]
    if not chosen or args.minutes <= 0:
        what = "--limit and --minutes must be above 0, --only a part of some job's name"
        raise UserError(f"nothing to verify: {what}")
    out = _prepared_folder(args.out, device)
    where = "kernels in the interpreter" if device.type == "cpu" else _gpu_name(device)
    minutes = f"at most {args.minutes:g} minutes"
    console.print(f"verify: {len(chosen)} jobs on {device} ({where}), {minutes}")
    unknown = chosen
    if device.type == "cuda" and not args.again:
        unknown = [i for i in chosen if not has_record(jobs[i], device)]
        for i in sorted({*chosen} - {*unknown}):
            console.print(f"[dim]known[/] {jobs[i].name}")
    found: dict[int, dict[str, Any]] = {}
    try:
        _prove_and_time(jobs, unknown, device, args, out, found, console)
    finally:  # what was proven and timed before a Ctrl-C is
        if device.type == "cuda":
            missed = [labels_of(jobs[i], device) for i in unknown if i not in found]
            written = _merge(records_of(list(found.values()), missed))
            console.print(f"{written} records in {records.user_file()}; auto uses them from now on")
        with (out / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(found[i]) + "\n" for i in sorted(found))
    known, left = len(chosen) - len(unknown), len(unknown) - len(found)
    console.print(_summary(list(found.values()), known, left, _takes_times(args, device)))
    console.print(f"raw results: {out}")
    if device.type == "cpu":
        console.print("This was a CPU: no record is written.")
    return 1 if any(result["problem"] is not None for result in found.values()) else 0


def _takes_times(args: argparse.Namespace, device: torch.device) -> bool:
    return device.type == "cuda" and not args.parity_only


def _prove_and_time(
    jobs: list[Any],
    unknown: Sequence[int],
    device: torch.device,
    args: argparse.Namespace,
    out: Path,
    found: dict[int, dict[str, Any]],
    console: Any,
) -> None:
    """Parity in lanes, then, with the GPU to itself, the times of what passed, in order of worth.

    Fills ``found``, index of a job -> its raw result, as the results come.
    """
    seconds = args.minutes * 60.0
    end = time.monotonic() + seconds
    times = _takes_times(args, device)

    def proven(result: dict[str, Any]) -> None:
        found[result["job"]] = {**_labels(jobs, result, device), **result}
        console.print(_line(jobs, result))

    def timed(result: dict[str, Any]) -> None:
        if result["problem"] is not None:
            result = {**result, "problem": f"not timed: {result['problem']}"}
            if result.get("lost"):  # at full size, where parity looked at a slice
                result["parity"] = False
        found[result["job"]].update(result)
        console.print(_line(jobs, result))

    worker = _worker(device)
    lanes = lane_count(device.type, len(unknown))
    share = seconds / 2 if times else seconds
    prove([*worker, "--phase", "parity"], unknown, lanes, out, JOB_SECONDS, share, proven)
    passed = [i for i in unknown if found.get(i, {}).get("parity")]
    if times and passed:
        command = [*worker, "--phase", "times"]
        run_lanes(command, {"times": passed}, out, JOB_SECONDS, end - time.monotonic(), timed)


def _worker(device: torch.device) -> list[str]:
    return [sys.executable, "-m", "fused_lm.parity.worker", "--device", str(device)]


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


def records_of(
    results: list[dict[str, Any]], missed: Sequence[dict[str, Any]] = ()
) -> list[records.Record]:
    """The records that raw results of a GPU prove: parity failures, and what passed and was timed.

    What passed but has no times makes none, and no other case of its class either, so that the next
    run goes on there. ``missed`` are labels of cases without a result.
    """
    untimed = [r for r in results if r.get("parity") and "times" not in r]
    unfinished = {_class_of(labels) for labels in (*untimed, *missed)}
    made = []
    for result in results:
        if "gpu" not in result or result.get("worst") == NOT_MEASURED:
            continue
        if result["parity"] and _class_of(result) in unfinished:
            continue
        for mode in ("infer", "train"):
            ratio = result.get("times", {}).get(mode, {}).get("ratio", 0.0)
            kernel = result["kernel"]
            if mode == "train":  # one that ran before they were told apart has one for both
                kernel = result.get("training_kernel", kernel)
            made.append(
                records.Record(
                    result["op"],
                    result["backend"],
                    kernel,
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


def _class_of(labels: dict[str, Any]) -> tuple[Any, ...]:
    names = ("op", "backend", "kernel", "training_kernel", "gpu", "dtype", "family", "size")
    return tuple(labels.get(name) for name in names)


def by_class(proven: list[records.Record]) -> dict[tuple[Any, ...], records.Record]:
    """One record per kernel, GPU and class: of several the worst."""
    worst: dict[tuple[Any, ...], records.Record] = {}
    for record in proven:
        key = (*records.key_of(record), record.size)
        other = worst.get(key)
        if other is None or (record.parity, record.ratio) < (other.parity, other.ratio):
            worst[key] = record
    return worst


def _merge(new: list[records.Record]) -> int:
    """New records replace old ones of the same kernel, GPU and class."""
    path = records.user_file()
    try:
        old = records.load(path) if path.is_file() else []
    except ValueError as error:
        print(f"replaced: {error}", file=sys.stderr)
        old = []
    fresh = by_class(new)
    merged = {(*records.key_of(record), record.size): record for record in old}
    merged.update(fresh)
    try:
        records.save(path, merged.values())
    except OSError as error:
        raise UserError(f"can't write the record {path}: {error.strerror}") from error
    return len(fresh)


def _summary(results: list[dict[str, Any]], known: int, left: int, times: bool) -> str:
    passed = sum(result["problem"] is None for result in results)
    timed = sum("times" in result for result in results)
    parts = [f"{passed} passed", f"{len(results) - passed} failed"]
    parts += [f"{timed} timed"] if times else []
    parts += [f"{known} known"] if known else []
    parts += [f"{left} not reached"] if left else []
    more = left or (times and timed < passed)
    return ", ".join(parts) + (": run it again, it goes on there" if more else "")


def _line(jobs: list[Any], result: dict[str, Any]) -> str:
    from rich.markup import escape

    name = jobs[result["job"]].name
    if result["problem"] is not None:
        return f"[red]FAIL[/] {name}: {escape(result['problem'])}"
    ratios = {mode: times["ratio"] for mode, times in result.get("times", {}).items()}
    speed = ", ".join(f"{mode} {ratio:.2f}x" for mode, ratio in ratios.items())
    return f"[green]ok[/]   {name}" + (f": {speed} of PyTorch's speed" if speed else "")
