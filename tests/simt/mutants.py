"""Synchronisations of the kernels, dropped one at a time from calls that pass them.

A mutant is a place and a call: ``common/warp.h``'s barrier serves several kernels, and each must
need it. Where instantiations of one kernel share its lines, one of them must. Runs without the drop
come first, so that a death is the mutant's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.simt import build, report, runtime
from tests.simt.survivors import SURVIVORS

CSRC = build.ROOT / "csrc"
SYNCHRONISES = re.compile(
    r"\b(__syncthreads\w*|__syncwarp|named_barrier_(?:sync|arrive)|(?:fence_)?mbarrier_\w+"
    r"|(?:cp_async|bulk|wgmma)_(?:commit|wait\w*)|wgmma_fence|fence_proxy_async"
    r"|cluster_(?:arrive|wait))\s*[(<]"
)
"""Calls that ask ``takes_part``: the words of tests/simt/ptx."""
_INCLUDE = re.compile(r'#include "((?:common|kernels)/[^"]+)"')

Key = tuple[str, str, int]
"""(path below csrc, the line without indentation, which of the file's lines that read so)."""
Site = tuple[str, int]
Run = Callable[[], Sequence[Tensor]]


class Hunt:
    """Drops what calls pass, and remembers what died of it and what did not. Every call must need
    what it passes; or one of them, and what has died is not dropped again.
    """

    def __init__(
        self, harness: runtime.Harness, schedules: int, *, in_every_call: bool = True
    ) -> None:
        self.harness = harness
        self.in_every_call = in_every_call
        self.schedules = [runtime.Schedule.of_seed(seed) for seed in range(schedules)]
        self.seen: set[Site] = set()
        self.killed: set[Key] = set()
        self.alive: dict[Key, list[str]] = {}

    def drop_each(self, name: str, run: Run) -> None:
        """Every place that ``run`` passes, until a schedule shows its loss."""
        first = self.schedules[0]
        self.harness.configure(first)
        self.harness.module.forget_sites()
        right = {first: run()}
        passed = {(file, line) for file, line, _ in self.harness.module.sites()}
        self.seen |= passed
        for site in sorted(passed):
            key = key_of(site)
            if key in self.killed and not self.in_every_call:
                continue
            report.MUTANTS.add(f"{self.harness.name} {site[0]}:{site[1]} {name}")
            if not self._dies(site, run, right):
                self.alive.setdefault(key, []).append(name)
                continue
            self.killed.add(key)
            if not self.in_every_call:
                self.alive.pop(key, None)
        self.harness.configure()

    def _dies(self, site: Site, run: Run, right: dict[runtime.Schedule, Sequence[Tensor]]) -> bool:
        for schedule in self.schedules:
            if schedule not in right:
                self.harness.configure(schedule)
                right[schedule] = run()
            self.harness.configure(replace(schedule, dropped=site))
            try:
                mutated = run()
            except RuntimeError:
                return True
            if any(not torch.equal(a, b) for a, b in zip(right[schedule], mutated, strict=True)):
                return True
        return False

    def problems(self, sources: set[Path]) -> list[str]:
        """What a test must refuse, for the kernels of these files."""
        never = sorted(calls_in(sources) - self.seen)
        found = [f"no call passes {file}:{line}" for file, line in never]
        found += [f"dropping {k} changes nothing in {v}" for k, v in self._unexplained()]
        known = {key_of(site) for site in self.seen}
        for key in SURVIVORS:
            if CSRC / key[0] in sources and (key not in known or key not in self.alive):
                found.append(f"survivors.py names {key}, which is gone or dies in every call")
        return found

    def _unexplained(self) -> list[tuple[Key, list[str]]]:
        return [(key, calls) for key, calls in self.alive.items() if key not in SURVIVORS]


def key_of(site: Site) -> Key:
    """What stays when lines move."""
    path, lines = Path(site[0]), Path(site[0]).read_text().splitlines()
    text = lines[site[1] - 1].strip()
    nth = sum(line.strip() == text for line in lines[: site[1]])
    name = path.relative_to(CSRC) if path.is_relative_to(CSRC) else path
    return (str(name), text, nth)


def calls_in(sources: set[Path]) -> set[Site]:
    """Where files synchronise, by their words."""
    found = set()
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if SYNCHRONISES.search(line.split("//")[0]):
                found.add((str(path), number))
    return found


def sources_of(pattern: str) -> set[Path]:
    """Kernel files of an operator, and what they include of csrc."""
    found: set[Path] = set()
    waiting = sorted((CSRC / "kernels").glob(pattern))
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [CSRC / name for name in _INCLUDE.findall(path.read_text())]
    return found
