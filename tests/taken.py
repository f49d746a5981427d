"""Which backend took how many cases of the tests that compare modules, for pytest's last lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from fused_lm import dispatch

CASES: set[str] = set()
"""Every case of this process as ``suite|forced backend|yes or no|case``."""


@contextmanager
def choices() -> Iterator[list[tuple[str, str]]]:
    """(operator, backend) of every choice that dispatch makes inside."""
    made: list[tuple[str, str]] = []
    choose = dispatch.choose

    def noting(op: str, call: Any) -> str:
        backend = choose(op, call)
        made.append((op, backend))
        return backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", noting)
        yield made


@contextmanager
def watched(suite: str, forced: str, case: str) -> Iterator[list[tuple[str, str]]]:
    """As :func:`choices`; notes whether the forced backend took anything, for the last lines."""
    with choices() as made:
        yield made
    took = any(backend == forced for _, backend in made)
    CASES.add(f"{suite}|{forced}|{'yes' if took else 'no'}|{case}")


def share(cases: Sequence[str] | set[str], suite: str, forced: str) -> tuple[int, int]:
    """(cases that the backend took, all cases) of a suite."""
    mine = [case.split("|")[2] for case in cases if case.startswith(f"{suite}|{forced}|")]
    return mine.count("yes"), len(mine)


def lines(cases: set[str]) -> list[str]:
    """``suite: backend took 12 of 15, ...`` for every suite."""
    suites: dict[str, Counter[str]] = {}
    for case in sorted(cases):
        suite, forced, *_ = case.split("|")
        suites.setdefault(suite, Counter())[forced] += 1
    return [
        f"{suite}: "
        + ", ".join("{} took {} of {}".format(f, *share(cases, suite, f)) for f in sorted(backends))
        for suite, backends in suites.items()
    ]
