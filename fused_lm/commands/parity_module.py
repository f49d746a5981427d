"""``fused-lm parity --module``: a user's own module before and after ``fuse()``."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from fused_lm.commands.errors import UserError, one_sentence
from fused_lm.commands.own_module import build, inputs_of
from fused_lm.commands.parity import chosen_device, import_triton_if_there, write_lines
from fused_lm.parity.module import Pair, Parity, compare_pair, prepare
from fused_lm.parity.module_costs import memory, speed
from fused_lm.parity.module_runs import one_line
from fused_lm.parity.run import DTYPES, use_interpreter_without_gpu

SHOWN = 12
"""Tensors in the table, if all are right; of wrong ones all are shown."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if all is within tolerance, 1 if not or if ``fuse()`` changes nothing.

    Raises:
        UserError: The module can't be found, built or called, or options don't go together.
    """
    from rich.console import Console

    for option, given in (("--backend", args.backend), ("--dtype", args.dtype)):
        if given and len(given) > 1:
            raise UserError(f"{option} can be given once with --module, got {', '.join(given)}")
    if args.quick:
        raise UserError("--quick is for the operators' own cases: it can't go with --module")
    device, backend = chosen_device(args.device), (args.backend or [None])[0]
    if device.type == "cpu" and backend == "triton":
        use_interpreter_without_gpu()
        import_triton_if_there()
    dtype = (args.dtype or ["float32"])[0]
    module, notes = build(args.module, args.args, args.kwargs)
    inputs = inputs_of(module, args)
    with one_sentence(ValueError):
        pair = prepare(
            module, *inputs, dtype=DTYPES[dtype], device=device, backend=backend, train=args.train
        )
    console = Console(highlight=False)
    where = f"{dtype} on {device}, backend {pair.backend}"
    mode = "training" if args.train else "eval"
    console.print(
        f"{args.module} before and after fuse(): {where}, {mode} mode", markup=False, soft_wrap=True
    )
    console.print(str(pair.report), markup=False, soft_wrap=True)
    results: dict[str, Any] = {
        "module": args.module, "dtype": dtype, "device": str(device), "backend": pair.backend,
        "train": args.train, "changed": pair.report.changed,
        "fused": [row._asdict() for row in pair.report.rows],
    }  # fmt: skip
    if pair.report.changed:
        with one_sentence(ValueError):
            found = compare_pair(pair)
        _print_parity(console, found, [*notes, *found.notes])
        ok = found.ok
        results |= {
            "exact": str(found.exact).removeprefix("torch."),
            "tensors": [row._asdict() for row in found.rows],
            "notes": [*notes, *found.notes],
            **_measure(console, pair),
        }
    else:
        console.print("fuse() changed nothing in this module: there is nothing to compare")
        ok = False
    if args.json:
        write_lines(args.json, [json.dumps(_strict({**results, "ok": ok}), default=str)])
    return 0 if ok else 1


def _print_parity(console: Any, found: Parity, notes: list[str]) -> None:
    from rich.table import Table

    exact = str(found.exact).removeprefix("torch.")
    wrong = [row for row in found.rows if row.problem is not None]
    table = Table(title=f"worst errors against {exact}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for header in ("stock", "fused", "allowed"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in found.rows[: max(SHOWN, len(wrong))]:
        errors = [f"{e:.1e}" for e in (row.stock_error, row.error, row.allowed)]
        table.add_row(row.name, *errors, "[red]FAIL[/]" if row.problem else "[green]ok[/]")
    console.print(table)
    for row in wrong:
        console.print(str(row.problem), markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    right = len(found.rows) - len(wrong)
    console.print(f"{right} of {len(found.rows)} tensors within tolerance of {exact}")


def _measure(console: Any, pair: Pair) -> dict[str, Any]:
    """Prints times and memory; what can't be measured is no verdict on the kernels."""
    found: dict[str, Any] = {"times_us": None, "memory_bytes": None}
    on_cpu = pair.device.type == "cpu"
    interpreted = on_cpu and pair.backend == "triton"
    try:
        times, (what, stock, fused) = [] if interpreted else speed(pair), memory(pair)
    except Exception as error:
        console.print(f"not measured: {one_line(error)}", markup=False, soft_wrap=True)
        return found
    auto = ", where auto runs PyTorch's operators" if pair.backend == "auto" else ""
    caveat = f" on a CPU{auto}: says nothing about a GPU" if on_cpu else " of the GPU"
    console.print(
        "no times: kernels ran in Triton's interpreter" if interpreted else f"median times{caveat}",
        soft_wrap=True,
    )
    for name, before, after in times:
        ratio = f"{before / after:.2f}x stock's speed"
        console.print(f"  {name}: stock {before:,.0f} us, fused {after:,.0f} us, {ratio}")
    unit, size = ("MiB", 2**20) if stock >= 2**20 else ("KiB", 2**10)
    sizes = f"stock {stock / size:,.2f} {unit}, fused {fused / size:,.2f} {unit}"
    console.print(f"memory, {what}: {sizes}")
    if times:
        found["times_us"] = {name: {"stock": s, "fused": f} for name, s, f in times}
    found["memory_bytes"] = {"what": what, "stock": stock, "fused": fused}
    return found


def _strict(value: Any) -> Any:
    """For JSON, which has no inf and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
