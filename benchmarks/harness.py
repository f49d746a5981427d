"""Races: one case, several contestants, the same inputs, one run. ``benchmarks/attention.py`` and
its neighbours say what is raced; here is how.

Gate first: a contestant whose output or gradients are off gets a sentence and no number, and so
does one that isn't installed or refuses the case. Then times: of forward and backward, or of both
together, calls in turn, so that they share clocks and temperature, behind a flushed L2, of the GPU
alone (:mod:`fused_lm.parity.timing`). Each line is written down at once, and a race that was cut
goes on where it was (:mod:`benchmarks.diary`).

On a CPU it is a dry run: every line says so, and names no GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fused_lm.parity.timing import median

from .contest import Case, Contestant, Given, Run
from .diary import Diary, Event
from .energy import counter, millijoules
from .passes import WAYS, host_us, spread, times_of

MOST_ERROR = 2e-2
"""Norm of the difference to fp64 over fp64's: 16-bit operands are at 1e-3 to 1e-2."""
SENTENCE = 160


class ContextLost(Exception):
    """A contestant has broken the GPU's context, and with it this process."""


def results_of(
    case: Case, contestants: Sequence[Contestant], device: torch.device
) -> Iterator[dict[str, Any]]:
    """A line per contestant and pass, or why there is none; before each contestant, that it begins.

    Raises:
        ContextLost: After the line that says why.
    """
    if device.type == "cuda":
        _forget_compiled()
    torch.manual_seed(0)
    given = case.given(device)
    passes: dict[str, dict[str, Callable[[], None]]] = {way: {} for way in case.work()}
    about: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        yield {"case": case.name, "contestant": contestant.name, "event": Event.BEGUN}
        calls, problem = None, None
        try:
            calls, about[contestant.name] = _admitted(contestant, case, given, device)
        except Exception as error:  # what a contestant refuses, in its words
            problem = _sentence(error)
        if calls is None:
            yield {"case": case.name, "contestant": contestant.name, "problem": problem}
            _free(device, contestant.name)
            continue
        for way, call in calls.items():
            passes[way][contestant.name] = call
    yield {"case": case.name, "event": Event.TIMES}
    read = counter() if device.type == "cuda" else None
    for way, named in passes.items():
        work = case.work()[way]
        for name, times in zip(named, times_of(list(named.values()), device), strict=True):
            us = median(times)
            rate = {"tokens_per_s": round(work.tokens / us * 1e6)} if work.tokens else {}
            if work.tokens and read is not None:
                rate["mj"] = round(millijoules(named[name], read))
            yield {
                "case": case.name, "contestant": name, "pass": way, "us": round(us, 1),
                "spread": round(spread(times), 3), "tflops": _round(work.flops / us / 1e6),
                "tbps": _round(work.bytes / us / 1e6), **rate, **about[name],
            }  # fmt: skip


def first_steps(
    case: Case, contestants: Sequence[Contestant], device: torch.device
) -> Iterator[tuple[str, float, str | None]]:
    """What each compiles at its first calls, compiled: its seconds, and why it was not.

    Raises:
        ContextLost: As of :func:`results_of`.
    """
    if device.type == "cuda":
        _forget_compiled()
    given = case.given(device)
    for contestant in contestants:
        begin, problem = perf_counter(), None
        try:
            with contestant.within():
                run = contestant.prepare(case, given.values)
                out = run()
            _called_once(contestant, run, out, case, given, device)
        except Exception as error:
            problem = _sentence(error)
        yield contestant.name, perf_counter() - begin, problem
        _free(device, contestant.name)


def _admitted(
    contestant: Contestant, case: Case, given: Given, device: torch.device
) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """Its calls by pass, each run once, and what was measured beside; raises if it is wrong."""
    with contestant.within():
        run = contestant.prepare(case, given.values)
        out, measured = _first_steps(run, given, device)
    return _called_once(contestant, run, out, case, given, device), measured


def _called_once(
    contestant: Contestant,
    run: Run,
    out: Tensor,
    case: Case,
    given: Given,
    device: torch.device,
) -> dict[str, Callable[[], None]]:
    """Its calls by pass, each run once."""
    calls = {way: _within(contestant, WAYS[way](run, out, given)) for way in case.work()}
    for call in calls.values():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def _within(contestant: Contestant, call: Callable[[], None]) -> Callable[[], None]:
    if contestant.within is nullcontext:
        return call

    def inside() -> None:
        with contestant.within():
            call()

    return inside


def _free(device: torch.device, name: str) -> None:
    """What a contestant has left behind; raises ContextLost if that is the GPU's context."""
    gc.collect()
    if not _context_lives(device):
        raise ContextLost(name)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _forget_compiled() -> None:
    """What torch.compile made for the cases before: else it gives up after eight of them, and runs
    the next ones in eager mode. Backwards are run more than once, which donated buffers forbid.
    """
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.donated_buffer = False


def _context_lives(device: torch.device) -> bool:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def _first_steps(run: Run, given: Given, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Two forwards and backwards: an output, and error, most memory and the host's time of a call.
    The first step compiles and tunes, and is judged; the second one's memory counts.

    Raises:
        ValueError: It is wrong.
    """
    measured: dict[str, Any] = {}
    gpu = device.type == "cuda"
    out = run()
    gradients = torch.autograd.grad(out, given.leaves, given.dout, retain_graph=True)
    if given.error is not None:
        error = given.error((out.detach(), *gradients))
        if not error <= MOST_ERROR:
            raise ValueError(f"error {error:.3g}, allowed {MOST_ERROR:g}")
        measured["error"] = float(f"{error:.3g}")
    del out, gradients
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = run()
    torch.autograd.grad(out, given.leaves, given.dout, retain_graph=True)
    if gpu:
        measured["step_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    measured["host_us"] = round(host_us(run, gpu), 1)
    return out, measured


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _sentence(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed"
    return (" ".join(str(error).split()) or type(error).__name__)[:SENTENCE]


def race(
    cases: Iterable[Case],
    contestants: Sequence[Contestant],
    device: torch.device,
    head: dict[str, Any],
    file: Path | None,
    end: float,
) -> tuple[list[dict[str, Any]], int]:
    """The lines of all cases that the time (time.monotonic) is enough for, and how many it is not.
    What a file has of this GPU, torch and commit is not measured again; a case that a process ended
    in is, without the contestant that it ended with.

    Raises:
        ContextLost: As of :func:`results_of`; the case goes on in another process.
    """
    diary = Diary(file, head)
    lines: list[dict[str, Any]] = []
    missed = 0
    for case in cases:
        if not diary.is_done(case.name):
            if time.monotonic() >= end:
                missed += 1
                continue
            _measure(case, contestants, device, diary)
        lines += diary.results(case.name)
    return lines, missed


def _measure(
    case: Case, contestants: Sequence[Contestant], device: torch.device, diary: Diary
) -> None:
    out = diary.left_out(case.name)
    told = {line["contestant"] for line in diary.results(case.name) if "problem" in line}
    if not diary.ended_in_times(case.name):
        diary.write({"case": case.name, "event": Event.START})
        for name, reason in out.items():
            diary.write({"case": case.name, "contestant": name, "problem": reason})
        chosen = [c for c in contestants if c.name not in {*out, *told}]
        try:
            for line in results_of(case, chosen, device):
                diary.write(line)
        except torch.OutOfMemoryError as error:
            diary.write({"case": case.name, "problem": _sentence(error)})
        except SystemExit:
            diary.write({"case": case.name, "event": Event.CUT})
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
    else:
        diary.write({"case": case.name, "problem": "hung or crashed when times were taken, twice"})
    diary.write({"case": case.name, "event": Event.DONE})
