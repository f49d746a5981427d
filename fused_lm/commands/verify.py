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
from fused_lm.commands.errors import UserError
from fused_lm.commands.parity import chosen_device

NAME = "verify"
HELP = "prove and time every kernel on this GPU, and let auto use those that win"
DEFAULT_MINUTES = 3.0
JOB_SECONDS = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time in all")
    parser.add_argument("--device", help="cuda or cpu (a dry run on tiny shapes, writes no record)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the raw results here")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N jobs")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every finished job passed parity, else 1."""
    from rich.console import Console

    from fused_lm.parity.supervise import supervise
    from fused_lm.parity.worker import jobs_for

    device = chosen_device(args.device)
    console = Console(highlight=False)
    jobs = jobs_for(device.type)[: args.limit]
    if not jobs or args.minutes <= 0:
        raise UserError("nothing to verify: --limit and --minutes must be above 0")
    out = args.out or Path(tempfile.mkdtemp(prefix="fused_lm_verify_"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "environment.json").write_text(json.dumps(_environment(device), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from error
    kind = "kernels in the interpreter" if device.type == "cpu" else torch.cuda.get_device_name()
    console.print(
        f"verify: {len(jobs)} jobs on {device} ({kind}), at most {args.minutes:g} minutes"
    )
    found = supervise(
        [
            sys.executable,
            "-m",
            "fused_lm.parity.worker",
            "--device",
            str(device),
            "--stop",
            str(len(jobs)),
        ],
        len(jobs),
        out / "results.jsonl",
        JOB_SECONDS,
        args.minutes * 60.0,
        lambda result: console.print(_line(jobs, result)),
    )
    failed = [result for result in found if result["problem"] is not None]
    console.print(f"{len(found) - len(failed)} passed, {len(failed)} failed", end="")
    console.print(f", {len(jobs) - len(found)} not reached" if len(found) < len(jobs) else "")
    console.print(f"raw results: {out}")
    if device.type == "cpu":
        console.print("This was a CPU: no record is written.")
    else:
        written = _merge(records_of(found))
        console.print(f"{written} records in {records.user_file()}; auto uses them from now on")
    return 1 if failed else 0


def records_of(results: list[dict[str, Any]]) -> list[records.Record]:
    """The records that raw results of a GPU prove; parity failures are recorded too."""
    made = []
    for result in results:
        if "gpu" not in result:
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
    old = records.load(path) if path.is_file() else []
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
    case, dtype = jobs[result["job"]]
    name = f"{case.op} {case.name} {dtype}"
    if result["problem"] is not None:
        return f"[red]FAIL[/] {name}: {result['problem']}"
    ratios = {mode: times["ratio"] for mode, times in result.get("times", {}).items()}
    speed = ", ".join(f"{mode} {ratio:.2f}x" for mode, ratio in ratios.items())
    return f"[green]ok[/]   {name}" + (f": {speed} of PyTorch's speed" if speed else "")


def _environment(device: torch.device) -> dict[str, Any]:
    from fused_lm.commands.doctor import examine

    return {"device": str(device), **examine()}
