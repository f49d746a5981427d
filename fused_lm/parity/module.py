"""A module before and after ``fuse()``: its error against fp64, its time and its memory.

    pair = prepare(model, (x,))        # copies: the model itself stays as it is
    found = compare_pair(pair)         # outputs and every gradient, held against fp64
    found.ok, found.rows               # what it costs: fused_lm.parity.module_costs

The rule is that of :mod:`fused_lm.tolerance`: fp64 runs the stock module with the same weights and
inputs, rounded to the working dtype, and the fused module may be twice as far from that as stock.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lm import dispatch
from fused_lm.parity.module_runs import (
    SEED,
    Inputs,
    Results,
    Way,
    mapped,
    one_line,
    outputs_of,
    results_of,
)
from fused_lm.tolerance import compare, max_error

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Pair(NamedTuple):
    """Two modules with the same weights, in the same dtype on the same device.

    ``report`` is what ``fuse()`` returned; ``backend`` holds for the fused one, ``auto`` or forced.
    """

    stock: nn.Module
    fused: nn.Module
    inputs: Inputs
    report: Any
    dtype: torch.dtype
    device: torch.device
    backend: str
    notes: tuple[str, ...]


class Row(NamedTuple):
    """Verdict on one tensor. Errors are absolute; of integers, how many values differ."""

    name: str
    stock_error: float
    error: float
    allowed: float
    problem: str | None


class Parity(NamedTuple):
    """Verdicts on all tensors, the worst first; ``exact`` is the dtype they were held against."""

    exact: torch.dtype
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(row.problem is None for row in self.rows)


def prepare(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    train: bool = False,
    fuse: Callable[[nn.Module], Any] | None = None,
) -> Pair:
    """Copies a module twice, rounds weights and inputs to ``dtype``, and fuses one copy.

    Args:
        module: Left as it is.
        args, kwargs: Of its forward; tensors in them may be nested.
        dtype: Of the parameters, buffers and inputs that are floats.
        backend: For the fused copy. Default: the one that is in force, ``auto`` unless forced.
        train: Training mode, with every dropout set to 0.
        fuse: Changes a module in place and returns a report. Default: ``fuse()`` of
            :mod:`fused_lm.integrations`.
    Raises:
        ValueError: The module can't be copied.
    """
    try:
        stock = copy.deepcopy(module).to(device=device, dtype=dtype).train(train)
        stopped = _stop_dropout(stock) if train else 0
        fused = copy.deepcopy(stock)
    except Exception as error:
        raise ValueError(f"the module can't be copied: {one_line(error)}") from error
    inputs = mapped(
        Inputs(tuple(args), dict(kwargs or {})),
        lambda _, t: t.detach().to(device, dtype if t.is_floating_point() else t.dtype),
    )
    backend = backend or dispatch.current_backend()
    with dispatch.use_backend(backend):
        report = (fuse or importlib.import_module("fused_lm.integrations.fuse").fuse)(fused)
    notes = (f"dropout was set to 0 in both modules, in {stopped} places",) if stopped else ()
    return Pair(stock, fused, inputs, report, dtype, torch.device(device), backend, notes)


def compare_pair(pair: Pair) -> Parity:
    """Holds outputs and gradients of the fused module against fp64; in eval mode also the outputs
    without gradients, where other kernels may run.

    The loss is the sum of all outputs, each times fixed random numbers. A module that can't run in
    fp64 is held against stock in fp32. Where that is no wider than the working dtype, stock's error
    is taken to be what a change of the last bit of all that goes in makes.

    Raises:
        ValueError: The stock module fails on the inputs, returns nothing to compare, or returns
            what depends on the random seed.
    """
    cotangents: Results = {}
    left_out: list[str] = []
    way = Way(pair.dtype)
    try:
        first = outputs_of(pair.stock, pair.inputs, way, left_out)
        again = outputs_of(pair.stock, pair.inputs, way._replace(seed=SEED + 1))
        stock = yardstick = results_of(pair.stock, pair.inputs, way, cotangents)
    except Exception as error:
        raise ValueError(f"the module fails on these inputs: {one_line(error)}") from error
    if not first:
        raise ValueError("the module returns no tensor, so there is nothing to compare")
    for name in first:
        if _row(name, first, first, first, again).problem is not None:
            raise ValueError(f"{name} depends on the random seed, so an error of it means nothing")
    exact_dtype, exact, notes = _exact(pair, cotangents)
    if torch.finfo(exact_dtype).eps >= (eps := torch.finfo(pair.dtype).eps):
        yardstick = results_of(pair.stock, pair.inputs, way._replace(nudge=eps), cotangents)
        notes.append("stock's error is what a change of the last bit of all that goes in makes")
    notes += [f"not compared: {what}" for what in left_out]
    try:
        with dispatch.use_backend(pair.backend):
            ours = results_of(pair.fused, pair.inputs, way, cotangents)
        rows = [_row(n, stock, yardstick, exact, ours) for n in dict.fromkeys((*stock, *ours))]
    except Exception as error:  # whatever a kernel does is a verdict on it
        rows = [_failed("the fused module", one_line(error))]
    if not any(name.startswith("d ") for name in stock):
        notes.append("no output has a gradient: only outputs were compared")
    if blind := [row.name for row in rows if row.allowed == float("inf")]:
        what = f"stock gives NaN or inf where {exact_dtype} doesn't"
        notes.append(f"{what}, so nothing is proven of: {', '.join(blind)}")
    rows.sort(key=lambda r: (r.problem is None, -r.error / max(r.allowed, 1e-300)))
    return Parity(exact_dtype, tuple(rows), (*pair.notes, *notes))


def _stop_dropout(module: nn.Module) -> int:
    """Sets every rate to 0; returns in how many places."""
    stopped = 0
    for part in module.modules():
        for name, value in list(vars(part).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(part, _DropoutNd))
            if is_rate and isinstance(value, float) and value > 0.0:
                setattr(part, name, 0.0)
                stopped += 1
    return stopped


class _Wide(TorchDispatchMode):
    """Gives fp64 to whatever asks for a narrower float: modules that cast to fp32 inside, as many
    norms do, would round what they are measured by.
    """

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = (kwargs or {}).get("dtype") in NARROW
        return func(*args, **{**(kwargs or {}), **({"dtype": torch.float64} if narrow else {})})


def _exact(pair: Pair, cotangents: Results) -> tuple[torch.dtype, Results, list[str]]:
    """(dtype, results, notes) of the stock module in the widest way in which it runs."""
    ways: tuple[tuple[torch.dtype, Callable[[], AbstractContextManager[Any]], str], ...] = (
        (torch.float64, _Wide, ""),
        (torch.float64, contextlib.nullcontext, "fp64 with the module's own casts to less"),
        (torch.float32, contextlib.nullcontext, "stock in fp32"),
    )
    reason = ""
    for dtype, context, what in ways:
        try:
            with context():
                found = results_of(pair.stock, pair.inputs, Way(dtype), cotangents)
        except Exception as error:  # a narrower way may do
            reason = one_line(error)
        else:
            note = f"the module can't run in fp64 throughout ({reason}): it is held against {what}"
            return dtype, found, [note] if what else []
    raise ValueError(f"the module runs neither in fp64 nor in fp32: {reason}")


def _row(name: str, stock: Results, yardstick: Results, exact: Results, ours: Results) -> Row:
    if not all(name in results for results in (stock, yardstick, exact)):
        return _failed(name, "only there after fuse()")
    if name not in ours:
        return _failed(name, "missing after fuse()")
    got, expected = ours[name], stock[name]
    if expected.is_floating_point():
        verdict = compare(got, yardstick[name], exact[name], name)
        stock_error = max_error(yardstick[name], exact[name])
        return Row(name, stock_error, verdict.error, verdict.allowed, verdict.problem)
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (got, expected)]
        return _failed(name, f"{kinds[0]}, expected {kinds[1]}")
    count = int((got != expected).sum())
    problem = f"{name}: {count} of {got.numel()} values differ from stock" if count else None
    return Row(name, int((expected != exact[name]).sum()), count, 0.0, problem)


def _failed(name: str, problem: str) -> Row:
    return Row(name, 0.0, float("inf"), 0.0, f"{name}: {problem}")
