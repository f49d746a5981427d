"""Which backend runs an operator, and why: one table, one rule, one record of evidence.

For each operator :data:`TABLE` lists implementations. ``refuses(call)`` of an implementation is the
only statement of what it can do; the sentence it returns is what the user reads.

``auto`` takes a kernel only on evidence: a record (:mod:`fused_lm.records`) that says that this
kernel, on this GPU, in this pass and shape class passed parity and was at least as fast as PyTorch.
Of several such kernels it takes the one that its record calls the fastest. Without a record, and on
every CPU, PyTorch's own operators run; what they can't express, the reference does.

The choice of a user is a ``threading.local`` (a ContextVar breaks
``torch.compile(fullgraph=True)``) and, beside it, in :mod:`fused_lm.autograd_state`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from fused_lm import autograd_state, records

BACKENDS = ("cuda", "triton", "pytorch", "reference")
"""Names that can be forced; ``auto`` is the other choice."""

_LOGGER = logging.getLogger("fused_lm")
_FORCED = os.environ.get("FUSED_LM_BACKEND", "auto")
_LOGGING = os.environ.get("FUSED_LM_LOG", "0") == "1"
_logged: set[str] = set()


@dataclass(frozen=True)
class Impl:
    """One way to run an operator.

    Attributes:
        name: One of :data:`BACKENDS`.
        refuses: Takes the operator's call (a NamedTuple of its checked arguments), returns None or
            one sentence that says why this backend can't run it.
        needs_record: A kernel of ours, which ``auto`` takes only where a record speaks for it.
    """

    name: str
    refuses: Callable[[Any], str | None]
    needs_record: bool = False


@dataclass(frozen=True)
class Verdict:
    """One line of :class:`Explanation`: a backend, whether it would run, and the reason."""

    backend: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`fused_lm.why` returns; ``str()`` of it is a table."""

    op: str
    shapes: str
    backend: str | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}({self.shapes}) runs on: {self.backend or 'nothing, it raises'}"]
        width = max(len(verdict.backend) for verdict in self.verdicts)
        for verdict in self.verdicts:
            mark = "->" if verdict.backend == self.backend else "  "
            lines.append(f"{mark} {verdict.backend:<{width}}  {verdict.reason}")
        return "\n".join(lines)


TABLE: dict[str, tuple[Impl, ...]] = {}
"""Operator -> implementations, filled by the modules in ``ops/``: kernels of ours, whose order
breaks ties between records, then the others in order of preference.
"""


class _State(threading.local):
    def __init__(self) -> None:
        self.backend = _FORCED


def _checked_name(backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join((*BACKENDS, "auto"))
        raise ValueError(f"fused_lm has no backend {backend!r}; expected one of: {names}")
    return backend


_checked_name(_FORCED)
_state = _State()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces a backend in this thread: ``"cuda"``, ``"triton"``, ``"pytorch"``, ``"reference"`` or
    ``"auto"``.

    Raises:
        ValueError: Unknown name. A call that the forced backend refuses raises RuntimeError.
    """
    previous = current_backend()
    _set_backend(_checked_name(backend))
    try:
        yield
    finally:
        _set_backend(previous)


def current_backend() -> str:
    """The forced backend of this thread, or ``"auto"``."""
    return autograd_state.inherited() or _state.backend


def _set_backend(backend: str) -> None:
    _state.backend = backend
    if not is_compiling():
        autograd_state.stash(backend)


def choose(op: str, call: Any) -> str:
    """The name of the implementation that runs ``call``: the forced one, or under ``auto`` the
    kernel that is fastest by the records, else the first other one that takes it.

    Raises:
        RuntimeError: None takes it, or the forced one refuses, with the reason of each.
    """
    forced = current_backend()
    if forced == "auto":
        taken = _auto(op, call)
        if taken is None:
            raise RuntimeError(f"no backend runs this call of {op}\n{explain(op, call)}")
        if _LOGGING and not is_compiling():
            _log_once(op, call, taken)
        return taken
    for impl in TABLE[op]:
        if impl.name == forced:
            if impl.refuses(call) is None:
                return forced
            break
    raise RuntimeError(f"backend {forced!r} can't run this call of {op}\n{explain(op, call)}")


def _auto(op: str, call: Any) -> str | None:
    # Kernels of ours need a GPU record, so on a CPU nothing above PyTorch needs to be asked.
    subject = None if call[0].is_cpu else _subject(op, call)
    taken: str | None = None
    for impl in TABLE[op]:
        if impl.needs_record:
            if subject is None or _no_record(op, impl, subject):
                continue
            if taken is not None and not records.slower(op, taken, impl.name, *subject):
                continue
        elif taken is not None:
            break
        if impl.refuses(call) is None:
            taken = impl.name
    return taken


def explain(op: str, call: Any) -> Explanation:
    """Every backend's verdict on ``call`` and the one that runs."""
    forced, verdicts = current_backend(), []
    chosen = _auto(op, call) if forced == "auto" else None
    for impl in TABLE[op]:
        reason = impl.refuses(call)
        if reason is None and impl.needs_record and forced == "auto":
            reason = _passed_over(op, impl, chosen, _subject(op, call))
        if reason is None and forced not in ("auto", impl.name):
            reason, runs = f"can run it, but {forced!r} is forced", False
        else:
            runs = reason is None
            reason = reason or "can run it"
        if runs and chosen is None:
            chosen = impl.name
        verdicts.append(Verdict(impl.name, runs, reason))
    return Explanation(op, describe(call), chosen, tuple(verdicts))


_BAND = ("lower", "upper")


def describe(call: Any) -> str:
    """Shapes and dtypes of the tensors in a call, and its other arguments that aren't defaults."""
    parts = []
    for name, value in zip(call._fields, call, strict=True):
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            parts.append(f"{name} {list(value.shape)} {dtype} {value.device.type}")
        elif value is not None and value is not False and (value != 0 or name in _BAND):
            parts.append(f"{name}={value}")
    return ", ".join(parts)


_Subject = tuple[int, str, str, int, str]


def _subject(op: str, call: Any) -> _Subject | None:
    """(device index, dtype, family, size, mode): what a record must be about to speak for a kernel
    in this call; None where no record can.
    """
    device = call[0].device
    if device.type != "cuda":
        return None
    tensors = [t for t in call if isinstance(t, torch.Tensor)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    index = torch.cuda.current_device() if device.index is None else device.index
    dtype = str(call[0].dtype).removeprefix("torch.")
    family, size = records.SHAPE_CLASSES[op](call)
    # With dropout the passes of a checkpointed call must agree on who draws the mask.
    mode = "train" if training or getattr(call, "dropout_p", 0.0) > 0.0 else "infer"
    return index, dtype, family, size, mode


def _no_record(op: str, impl: Impl, subject: _Subject | None) -> str | None:
    """None if a record lets ``auto`` take this kernel, else the sentence that says what is
    missing.
    """
    if subject is None:
        return "auto takes kernels only on a GPU with a record; this is a CPU tensor"
    return records.missing(op, impl.name, *subject)


def _passed_over(op: str, impl: Impl, chosen: str | None, subject: _Subject | None) -> str | None:
    """Why ``auto`` doesn't take a kernel that could run a call, None for the one that it takes."""
    reason = _no_record(op, impl, subject)
    if reason is not None or subject is None or chosen is None or impl.name == chosen:
        return reason
    tie = f"{chosen} is as fast here by the records and comes first"
    return records.slower(op, impl.name, chosen, *subject) or tie


def _log_once(op: str, call: Any, backend: str) -> None:
    key = f"{op} {records.shape_class(op, call)} {call[0].dtype} {call[0].device.type} {backend}"
    if key in _logged:
        return
    _logged.add(key)
    refused = "; ".join(
        f"{verdict.backend}: {verdict.reason}"
        for verdict in explain(op, call).verdicts
        if not verdict.runs
    )
    _LOGGER.warning("fused_lm: %s -> %s%s", key, backend, f" ({refused})" if refused else "")
