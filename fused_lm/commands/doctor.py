"""``fused-lm doctor``: what is installed, what each operator would run here and why, what to
mend.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

import fused_lm
from fused_lm import dispatch, records
from fused_lm.commands import model_report
from fused_lm.cuda import extension
from fused_lm.version import __version__

NAME = "doctor"
HELP = "what is installed, what each operator would run here and why, and what to mend"
MINIMUM_TORCH = (2, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="report instead what training this model keeps in memory: gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl, or a checkpoint",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if something keeps fused_lm from working."""
    if args.model is not None:
        found = model_report.report(args.model)
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            _print_table(*model_report.rows_of(found))
        return 0
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if report["broken"] else 0


def examine() -> dict[str, Any]:
    """The whole report as plain data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faults = _faults()
    return {
        **describe_machine(),
        "operators": _operators(device),
        "device": str(device),
        "faults": faults,
        "broken": any(fault["breaks"] for fault in faults),
    }


def describe_machine() -> dict[str, Any]:
    """Versions and GPUs, without touching a GPU's memory."""
    return {
        "environment": _environment(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> dict[str, str | None]:
    own = records.user_file()
    return {
        "fused_lm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "NVIDIA driver": _driver(),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "CUDA extension": _extension(),
        "forced backend": dispatch.current_backend(),
        "records": f"{own} ({'there' if own.is_file() else 'none'})",
    }


def _extension() -> str:
    """What it was built with and for, or why it isn't there and what mends it."""
    why = extension.why_not()
    if why is not None:
        return why.removeprefix("the CUDA extension ")
    report = extension.build_report()
    cubins = ", ".join(f"sm_{arch}" for arch in report["archs"])
    return f"CUDA {report['toolkit']}, {cubins}, PTX of compute_{report['ptx']}"


def _driver() -> str | None:
    """The version the driver reports, without needing torch to see the GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi fails"
    return (done.stdout.split("\n")[0]).strip() or None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _operators(device: torch.device) -> list[dict[str, Any]]:
    """What a typical training call of each operator runs, with every backend's reason."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one = torch.empty((), dtype=dtype, device=device, requires_grad=True)  # a GPU may be full
    q, x = one.expand(1, 8, 1024, 64), one.expand(1024, 768)
    lse = one.detach().float().expand(1, 8, 1024)
    wide, head, logits = one.expand(3072, 768), one.expand(50257, 768), one.expand(1024, 50257)
    target = torch.zeros((), dtype=torch.int64, device=device).expand(1024)
    lens = target[:1]
    rows, bounds = one.expand(8192, 8, 64), target[:9].int()
    calls: list[tuple[str, tuple[torch.Tensor, ...], dict[str, Any]]] = [
        ("attention", (q, q, q), {"causal": True}),
        ("attention_weights", (q, q, lse), {"causal": True}),
        ("attention_decode", (q[:, :, :1].detach(), q.detach(), q.detach(), lens), {}),
        ("attention_varlen", (rows, rows, rows, bounds, bounds), {"causal": True}),
        ("layer_norm", (x,), {"residual": x}),
        ("rms_norm", (x,), {"residual": x}),
        ("rotary", (q, one.detach().expand(1024, 32), one.detach().expand(1024, 32)), {}),
        ("linear_act", (x, wide), {}),
        ("linear_residual", (x, one.expand(768, 768)), {"residual": x, "dropout_p": 0.1}),
        ("ffn", (x, wide, wide.T), {"recompute": True}),
        ("cross_entropy", (logits, target), {}),
        ("linear_cross_entropy", (x, head, target), {}),
    ]
    found = []
    for op, args, options in calls:
        with warnings.catch_warnings():  # faults say what the warning would
            warnings.simplefilter("ignore")
            explanation = fused_lm.why(op, *args, **options)
        reasons = {verdict.backend: verdict.reason for verdict in explanation.verdicts}
        found.append({"operator": op, "runs": explanation.backend, "reasons": reasons})
    return found


def _faults() -> list[dict[str, Any]]:
    """What is missing, each with the command that mends it."""
    faults = []

    def fault(what: str, command: str, breaks: bool = False) -> None:
        faults.append({"what": what, "mend": command, "breaks": breaks})

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        fault(f"torch {torch.__version__} is older than 2.10", "pip install -U 'torch>=2.10'", True)
    gpu_there = Path("/proc/driver/nvidia/version").exists() or _driver() is not None
    if gpu_there and torch.version.cuda is None:
        fault("a GPU is here, but torch is a CPU build", "pip install --force-reinstall torch")
    elif gpu_there and not torch.cuda.is_available():
        fault("a GPU is here, but torch can't use it (driver too old?)", "nvidia-smi")
    why = extension.why_not()
    # Without a GPU nobody misses it, but one that is there and broken is a fault anywhere.
    if why is not None and (gpu_there or "kernels" in extension.build_report()):
        fault(why.split("; mend: ")[0], extension.mending_command())
    if importlib.util.find_spec("triton") is None and platform.system() == "Linux":
        fault("triton is missing, so no kernel of ours can run", "pip install 'fused_lm[triton]'")
    missing = [name for name in ("rich", "safetensors", "matplotlib") if _version(name) is None]
    if missing:
        fault(f"the programs need {', '.join(missing)}", "pip install 'fused_lm[lm]'")
    if torch.cuda.is_available() and not _has_record():
        fault("no record for this GPU: auto runs PyTorch's operators", "fused-lm verify")
    return faults


def _has_record() -> bool:
    return any(record.gpu == torch.cuda.get_device_name() for record in records.known())


def _print(report: dict[str, Any]) -> None:
    forced, device = report["environment"]["forced backend"], report["device"]
    found = [[name, value or "none"] for name, value in report["environment"].items()]
    for gpu in report["gpus"]:
        found.append(["GPU", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_GiB']} GiB"])
    if not report["gpus"]:
        found.append(["GPU", "none: PyTorch's CPU operators run, kernels only in the interpreter"])
    _print_table("fused_lm doctor", ["what", "found"], found)
    operators = []
    for row in report["operators"]:
        others = [f"{b}: {r}" for b, r in row["reasons"].items() if b != row["runs"]]
        operators.append([row["operator"], row["runs"] or "nothing", "\n".join(others)])
    title = f"A training call under {forced} on {device}"
    _print_table(title, ["operator", "runs here", "why not another"], operators)
    for fault in report["faults"]:
        print(f"{fault['what']}. Mend: {fault['mend']}")
    if not report["faults"]:
        print("Nothing to mend.")


def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """With rich where it is installed; doctor must also work where it is what is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in rows:
            print("  " + " | ".join(cell.replace("\n", "; ") for cell in row))
        return
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
