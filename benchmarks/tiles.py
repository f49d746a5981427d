"""Which tiles a sweep tries: spots, the rows that the tables have there, and candidates.

A sweep is a race (:mod:`benchmarks.harness`) whose contestants are the table's row and a dozen
candidates in each case. Importing this imports Triton's kernels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from fused_lm.triton_kernels import attention as attention_launch
from fused_lm.triton_kernels import attention_tuning, linear_act_tuning
from fused_lm.triton_kernels import linear_act as linear_launch
from fused_lm.triton_kernels.launch import shared_memory_limit

from . import attention, ffn
from .contest import Contestant, Given, Run, Work
from .tune_choice import BATCH, ROW, Config

MOST_SUMS = 128
"""fp32 sums of a thread: more leave no registers for anything else."""

TOGETHER = 12
"""Candidates of a batch."""
LINEAR_FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")


@dataclass(frozen=True)
class Spot:
    """One choice of a table.

    Attributes:
        table: "attention" or "linear".
        kernel: As the table names it.
        case: Of the race whose call has this kernel.
        way: Pass of that race in which it runs.
    """

    table: str
    kernel: str
    case: Any
    way: str

    @property
    def name(self) -> str:
        return f"{self.table} {self.kernel}: {self.case.name}"

    def run(self, values: dict[str, Any]) -> Run:
        race = attention if self.table == "attention" else ffn
        return race.ours("triton", self.case, values)


def spots(dry: bool) -> list[Spot]:
    """In order of worth."""
    if dry:
        tiny, layer = attention.grid(True)[0], ffn.grid(True)[0]
        return [Spot("attention", "forward", tiny, "fwd"), Spot("linear", "forward", layer, "fwd")]
    found = []
    for width, hidden, kind in ((1024, 4096, "gelu_tanh"), (4096, 16384, "gelu_tanh")):
        case = ffn.Case(width, hidden, kind)
        found += [Spot("linear", "forward", case, "fwd")]
        found += [Spot("linear", kernel, case, "step") for kernel in ("wgrad", "dgrad")]
    found.append(Spot("linear", "gated", ffn.Case(2048, 5632, "swiglu"), "fwd"))
    for dim in (64, 128, 256):
        case = attention.Case(dim, 4096)
        found += [Spot("attention", "forward", case, "fwd")]
        found += [Spot("attention", kernel, case, "bwd") for kernel in ("dkdv", "dq")]
    small = attention.Case(64, 1024, ("bias",))
    return [
        *found,
        Spot("attention", "forward", small, "fwd"),
        Spot("attention", "dkdv", small, "bwd"),
    ]


@contextlib.contextmanager
def using(spot: Spot, config: Config) -> Iterator[None]:
    """Calls inside have this tile for the spot's kernel."""
    if spot.table == "attention":
        own = attention_launch.tune

        def tune(kernel: str, *arguments: Any) -> attention_tuning.Tuning:
            row = own(kernel, *arguments)
            return replace(row, **config) if kernel == spot.kernel else row

        with mock.patch.object(attention_launch, "tune", tune):
            yield
    else:
        gemm, wgrad = linear_launch.gemm_tuning, linear_launch.wgrad_tuning

        def gemm_tuning(kernel: str, *arguments: Any) -> linear_act_tuning.Tuning:
            row = gemm(kernel, *arguments)
            return replace(row, **config) if kernel == spot.kernel else row

        def wgrad_tuning(*arguments: Any) -> tuple[linear_act_tuning.Tuning, int]:
            row, parts = wgrad(*arguments)
            return (replace(row, **config), parts) if spot.kernel == "wgrad" else (row, parts)

        with mock.patch.multiple(linear_launch, gemm_tuning=gemm_tuning, wgrad_tuning=wgrad_tuning):
            yield


def row_of(spot: Spot, shared_limit: int | None, sms: int) -> Config:
    """What the table has for the spot."""
    if spot.table == "attention":
        case = spot.case
        size = case.dtype.itemsize
        score = size if "bias" in case.features else 0
        row: Any = attention_tuning.tune(spot.kernel, case.D, case.D, size, shared_limit, score)
        return {n: getattr(row, n) for n in ("BLOCK_T", "BLOCK_S", "num_warps", "num_stages")}
    case, limit = spot.case, shared_limit or 1 << 20
    size = case.dtype.itemsize
    M, C, F = case.tokens, case.width, case.hidden
    if spot.kernel == "wgrad":
        row, _ = linear_act_tuning.wgrad_tuning(F, C, M, size, limit, sms)
    else:
        columns = C if spot.kernel == "dgrad" else F
        row = linear_act_tuning.gemm_tuning(spot.kernel, M, columns, size, limit, sms)
    return {n: getattr(row, n) for n in LINEAR_FIELDS}


def candidates(spot: Spot, row: Config, shared_limit: int) -> list[Config]:
    """Tiles that fit, without the table's own; nearest to that one first."""
    if spot.table == "attention":
        choices: dict[str, tuple[int, ...]] = {
            "BLOCK_T": (32, 64, 128), "BLOCK_S": (32, 64, 128),
            "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
        }  # fmt: skip
    else:
        choices = {
            "block_m": (64, 128, 256), "block_n": (64, 128, 256), "block_k": (32, 64, 128),
            "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
        }  # fmt: skip
    every = (
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )
    fitting = [c for c in every if c != row and _fits(spot, c, shared_limit)]
    return sorted(fitting, key=lambda c: (sum(c[n] != row[n] for n in c), list(c.values())))


def _fits(spot: Spot, config: Config, shared_limit: int) -> bool:
    case = spot.case
    size = case.dtype.itemsize
    threads = 32 * config["num_warps"]
    if spot.table == "attention":
        row = attention_tuning.Tuning(spot.kernel, size, case.D, **config, reason="a candidate")
        score = size if "bias" in case.features else 0
        sums = config["BLOCK_S" if spot.kernel == "dkdv" else "BLOCK_T"] * case.D
        sums *= 2 if spot.kernel == "dkdv" else 1
        shared = row.shared_bytes(case.D, case.D, size, score, shared_limit)
    else:
        sides = 2 if spot.kernel == "gated" else 1
        sums = sides * config["block_m"] * config["block_n"]
        tile = linear_act_tuning.Tuning(**config, reason="a candidate")
        shared = tile.shared_bytes(size, sides)
    return shared <= shared_limit and sums <= MOST_SUMS * threads


@dataclass(frozen=True)
class Machine:
    """Where a sweep runs."""

    device: torch.device
    shared_limit: int | None  # None: Triton's interpreter
    sms: int

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        if device.type == "cpu":
            return cls(device, None, 1)
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        return cls(device, shared_memory_limit(arch), properties.multi_processor_count)

    def choices(self, spot: Spot) -> tuple[Config, list[Config]]:
        """The table's row, and what else there is; in the interpreter one tile."""
        row = row_of(spot, self.shared_limit, self.sms)
        if self.shared_limit is None:
            return row, [{n: max(16, v // 2) if "lock" in n.lower() else v for n, v in row.items()}]
        return row, candidates(spot, row, self.shared_limit)


@dataclass(frozen=True)
class Batch:
    """Some candidates of a spot, which are timed in turns with the table's row."""

    spot: Spot
    number: int

    @property
    def name(self) -> str:
        return f"{self.spot.name}{BATCH}{self.number}"

    def given(self, device: torch.device) -> Given:
        given: Given = self.spot.case.given(device)
        return given

    def work(self) -> dict[str, Work]:
        return {self.spot.way: self.spot.case.work()[self.spot.way]}


def batches(spot: Spot, machine: Machine) -> Iterator[tuple[Batch, list[Contestant]]]:
    """All of a spot's tiles; the table's row runs in every one."""
    row, others = machine.choices(spot)
    for number, first in enumerate(range(0, len(others), TOGETHER)):
        own = [_contestant(spot, config, "") for config in others[first : first + TOGETHER]]
        yield Batch(spot, number), [_contestant(spot, row, ROW), *own]


def _contestant(spot: Spot, config: Config, prefix: str) -> Contestant:
    name = f"{prefix}{json.dumps(config, sort_keys=True)}"
    return Contestant(
        name, lambda batch, values: batch.spot.run(values), True, partial(using, spot, config)
    )
