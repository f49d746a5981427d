"""The project's CUDA operators on torch CPU tensors, in one build of the harness.

    harness = load("race")
    harness.configure(order="random", seed=7)
    y, stream, mean, rstd = harness.call("layer_norm_fwd", x, None, weight, bias, ...)

Every tensor that goes in is copied into device memory of its own extent, and what comes out lies in
device memory too: between red zones, filled with NaN before.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.simt import build

ORDERS = ("round_robin", "reverse", "first", "random")
TIMINGS = ("eager", "lazy", "random")
LARGE_SHARED, MEDIUM_SHARED, SMALL_SHARED = 227 * 1024, 163 * 1024, 99 * 1024
"""Bytes of shared memory that a block may have: on an H100, an A100, a GeForce since sm_86."""
VECTOR_BYTES = 16
"""Widest access whose alignment a kernel asks about."""


@dataclass(frozen=True)
class Schedule:
    """Who runs next, when asynchronous copies happen, and what is switched off.

    ``seed`` steers the random ones and, unless it is 0, the order of the blocks. ``dropped``
    is (file, line) of a synchronisation that does nothing. A thread that makes more than
    ``most_accesses`` to memory without waiting for anybody spins. No block has more than
    ``max_smem_bytes`` of shared memory, which some kernels are chosen by; with ``hopper`` those for
    sm_90a run where there are any. ``multiprocessors`` are few, and more than one, so that
    persistent grids have several blocks with several tiles.
    """

    order: str = "round_robin"
    timing: str = "lazy"
    seed: int = 0
    count_transactions: bool = False
    most_accesses: int = 50_000_000
    max_smem_bytes: int = LARGE_SHARED
    hopper: bool = False
    multiprocessors: int = 2
    dropped: tuple[str, int] = ("", 0)

    @classmethod
    def of_seed(cls, seed: int) -> Schedule:
        """One of many, each with a fair chance."""
        order, timing = ORDERS[seed % 4], TIMINGS[seed // 4 % 3]
        return cls(order, timing, seed % 2**31)


class Harness:
    """One build, loaded into this process; ``scratch`` is one more file of kernels."""

    def __init__(self, name: str, scratch: Path | None = None) -> None:
        if name not in _allowed:
            raise RuntimeError(f"who needs the build {name} is slow; runtime.ONE is there anyway")
        self.name = name
        self.module = _import(name, build.build(name, scratch))
        self.schedule = Schedule()
        self.schedules: set[Schedule] = set()
        self.configure()

    def configure(self, schedule: Schedule | None = None, **choices: Any) -> None:
        """Sets the schedule of all following calls."""
        self.schedule = schedule or Schedule(**choices)
        given = asdict(self.schedule)
        dropped_file, dropped_line = given.pop("dropped")
        self.module.configure(**given, dropped_file=dropped_file, dropped_line=dropped_line)

    def call(self, op: str, *arguments: Any) -> Any:
        """Runs ``cuda_<op>``; a mistake in a kernel is a RuntimeError with what replays it."""
        function = getattr(getattr(torch.ops, build.module_name(self.name)), f"cuda_{op}").default
        self.schedules.add(self.schedule)
        with torch.no_grad(), self.device_memory():
            try:
                return run_on_copies(function, _mutated(function), arguments)
            except RuntimeError as error:
                text = str(error).split("\nException raised from")[0]
                raise RuntimeError(f"{text}\n(simt_{self.name}, {self.schedule})") from None

    @contextmanager
    def device_memory(self) -> Iterator[None]:
        """CPU tensors that this thread makes inside are allocations that the harness watches."""
        self.module.allocate_on_device(True)
        try:
            yield
        finally:
            self.module.allocate_on_device(False)

    @contextmanager
    def choosing(self, **choices: Any) -> Iterator[None]:
        """The schedule with other choices, for what runs inside."""
        before = self.schedule
        self.configure(replace(before, **choices))
        try:
            yield
        finally:
            self.configure(before)

    @contextmanager
    def counting(self, **choices: Any) -> Iterator[dict[str, int]]:
        """Counts what runs inside; the dict is filled at the end."""
        before = self.schedule
        self.configure(count_transactions=True, **choices)
        self.module.reset_counters()
        found: dict[str, int] = {}
        try:
            yield found
        finally:
            found.update(self.module.counters())
            self.configure(before)


@functools.cache
def load(name: str) -> Harness:
    """The harness of a build, compiled and imported at first use."""
    harness = Harness(name)
    _LOADED.append(harness)
    return harness


def loaded() -> list[Harness]:
    """Those of this process."""
    return list(_LOADED)


_LOADED: list[Harness] = []
_LIBRARIES: list[torch.library.Library] = []


def sanitized() -> bool:
    """Whether AddressSanitizer is in this process: then only its own build can run."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


ONE = "asan" if sanitized() else "race"
"""The build for what one of them shows. ``make test`` has this one alone: it sees what the plain
one sees, which takes minutes to compile as well.
"""
_allowed = set(build.BUILDS)


def allow_only(*names: str) -> None:
    """No other build is made from now on."""
    _allowed.intersection_update(names)


def _import(name: str, path: Path) -> Any:
    from fused_lm.ops.schemas import CUDA_SCHEMAS

    library = torch.library.Library(build.module_name(name), "DEF")
    for op, schema in CUDA_SCHEMAS.items():
        library.define(op + schema)
    _LIBRARIES.append(library)
    loader = importlib.machinery.ExtensionFileLoader(build.module_name(name), str(path))
    spec = importlib.util.spec_from_file_location(build.module_name(name), path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_on_copies(function: Any, mutated: set[int], arguments: Sequence[Any]) -> Any:
    """Calls a function with device copies of its tensors; what it may overwrite is copied back.

    Raises:
        RuntimeError: It wrote to a tensor that is not among ``mutated``, or between its rows.
    """
    copies = [_copied(a) if isinstance(a, Tensor) else None for a in arguments]
    before = [None if c is None else c.memory.view(torch.uint8).numpy().tobytes() for c in copies]
    result = function(
        *(a if c is None else c.tensor for a, c in zip(arguments, copies, strict=True))
    )
    for i, copy in enumerate(copies):
        if copy is None:
            continue
        if i in mutated:
            arguments[i].copy_(copy.tensor)
        elif copy.memory.view(torch.uint8).numpy().tobytes() != before[i]:
            raise RuntimeError(f"a kernel wrote to argument {i}, an input")
    return result


def _mutated(function: Any) -> set[int]:
    """Arguments that the schema lets an operator write to, ``Tensor(a!)``."""
    given = enumerate(function._schema.arguments)
    return {i for i, a in given if a.alias_info is not None and a.alias_info.is_write}


@dataclass(frozen=True)
class _Copy:
    """A tensor, and all the memory that it lies in."""

    tensor: Tensor
    memory: Tensor


def _copied(t: Tensor) -> _Copy:
    """The same sizes, strides and alignment in memory that ends where the tensor ends. What lies
    between its rows is NaN, as all fresh device memory is.
    """
    if t.numel() == 0:
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return _Copy(empty, torch.empty(0, dtype=t.dtype))
    steps = zip(t.shape, t.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    lead = t.data_ptr() % VECTOR_BYTES // t.element_size()
    memory = torch.empty(lead + extent, dtype=t.dtype)
    tensor = memory.as_strided(t.shape, t.stride(), lead)
    if _overlaps(t):
        memory[lead:].copy_(t.as_strided((extent,), (1,), t.storage_offset()))
    else:
        tensor.copy_(t)
    return _Copy(tensor, memory)


def _overlaps(t: Tensor) -> bool:
    """Whether two indices may name one element."""
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False
