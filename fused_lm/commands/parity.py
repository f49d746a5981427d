"""``fused-lm parity``: every operator on every backend and dtype that runs here, against fp64; with
``--module`` a module of the user's, before and after ``fuse()``.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby

import torch

from fused_lm.commands.errors import UserError
from fused_lm.dispatch import BACKENDS

NAME = "parity"
HELP = "hold every operator x backend x dtype that runs here against fp64"
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
QUICK_DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="only this (repeatable)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPE_NAMES, help="only this (repeatable)"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK_DTYPES)}")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON lines")
    own = parser.add_argument_group("a module of yours, before and after fuse()")
    own.add_argument("--module", metavar="PKG:NAME", help="its class, a function or a module; or "
                     "FILE.py:NAME")  # fmt: skip
    own.add_argument("--args", metavar="JSON", help="a list, for the constructor")
    own.add_argument("--kwargs", metavar="JSON", help="an object, for the constructor")
    own.add_argument("--input", metavar="SHAPE", nargs="+", action="extend", help="of each tensor: "
                     "2,128,512 or 2,128:int64<50257 or mask=2,128:bool")  # fmt: skip
    own.add_argument("--inputs", metavar="PKG:NAME", help="a function: args, or (args, kwargs)")
    own.add_argument("--train", action="store_true", help="in training mode, without dropout")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every verdict is ok, else 1."""
    if args.module is not None:
        from fused_lm.commands import parity_module

        return parity_module.run(args)
    for option in ("args", "kwargs", "input", "inputs", "train"):
        if getattr(args, option):
            raise UserError(f"--{option} needs --module")
    from rich.console import Console
    from rich.progress import track

    from fused_lm.parity.cases import SMALL
    from fused_lm.parity.run import run_case, runnable, use_interpreter_without_gpu

    device = chosen_device(args.device)
    if device.type == "cpu":
        use_interpreter_without_gpu()
        import_triton_if_there()
    dtypes = tuple(args.dtype or (QUICK_DTYPES if args.quick else DTYPE_NAMES))
    jobs = [
        (case, backend, dtype)
        for case in SMALL
        for backend in args.backend or BACKENDS
        for dtype in dtypes
        if runnable(case, backend, dtype, device)
    ]
    if not jobs:
        raise UserError("nothing of what was asked for runs here; see: fused-lm doctor")
    console = Console(highlight=False)
    results = [
        run_case(case, backend, dtype, device)
        for case, backend, dtype in track(jobs, "parity", console=console, transient=True)
    ]
    if any(r.device == "interpreter" for r in results):
        console.print("triton: the kernels run in Triton's interpreter, there is no GPU")
    console.print("worst tensor, its error against fp64 and the error allowed:")
    for title, group in groupby(results, key=lambda r: f"{r.op}, {r.case}"):
        console.print(f"[bold]{title}[/]")
        for r in group:
            verdict = "[green]ok[/]" if r.ok else "[red]FAIL[/]"
            numbers = f"{r.worst:<9} {r.error:.1e} of {r.allowed:.1e}"
            console.print(f"  {r.backend:<10} {r.dtype:<9} {numbers}  {verdict}")
    failed = [r for r in results if not r.ok]
    for r in failed:
        console.print(f"{r.op} {r.case} {r.backend} {r.dtype}: {r.problem}", markup=False)
    console.print(f"{len(results) - len(failed)} of {len(results)} within tolerance of fp64")
    if args.json:
        write_lines(args.json, [json.dumps(r.as_dict()) for r in results])
    return 1 if failed else 0


def chosen_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: expected cuda, cuda:N or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; see: fused-lm doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def import_triton_if_there() -> None:
    """The interpreter is on only once triton is imported."""
    import contextlib

    with contextlib.suppress(ImportError):
        from fused_lm.triton_kernels import attention  # noqa: F401


def write_lines(path: str, lines: list[str]) -> None:
    """Writes a text file; UserError where it can't be."""
    try:
        with open(path, "w") as file:
            file.write("".join(line + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
