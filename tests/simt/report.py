"""What a test run executed on the harness, for the last lines of pytest: kernels, instantiations,
schedules, mutants, and which backend took the cases of the modules, summed over the processes of
xdist.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests import taken
from tests.simt import runtime

MUTANTS: set[str] = set()
"""Every synchronisation that a test of this process has dropped, as ``build file:line``."""
PLANTED: set[str] = set()
"""Every planted mistake that a test of this process has run, as ``build name``."""
SANITIZED: set[str] = set()
"""What the processes under sanitizers printed here, in their turn."""

_totals: dict[str, set[str]] = {}


def found_here() -> dict[str, list[str]]:
    """What this process ran, as lists that xdist can carry."""
    kernels: set[str] = set()
    schedules: set[str] = set()
    for harness in runtime.loaded():
        kernels |= {f"{harness.name} {name}" for name in harness.module.kernels_run()}
        schedules |= {f"{harness.name} {schedule}" for schedule in harness.schedules}
    return {
        "kernels": sorted(kernels),
        "schedules": sorted(schedules),
        "mutants": sorted(MUTANTS),
        "planted": sorted(PLANTED),
        "sanitized": sorted(SANITIZED),
        "taken": sorted(taken.CASES),
    }


def _add(found: dict[str, list[str]]) -> None:
    for kind, names in found.items():
        _totals.setdefault(kind, set()).update(names)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is None:
        _add(found_here())
    else:
        output["simt"] = found_here()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _add(getattr(node, "workeroutput", {}).get("simt", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _totals.get("taken"):
        terminalreporter.section("modules: who took the cases", sep="-")
        for line in taken.lines(_totals["taken"]):
            terminalreporter.write_line(line)
    product = {k for k in _totals.get("kernels", ()) if "planted" not in k}
    if not product and not _totals.get("planted"):
        return
    instantiations = {name.split(" ", 1)[1] for name in product}
    kernels = {re.sub(r"^.*?(\w+)(<.*)?\(.*$", r"\1", name) for name in instantiations}
    builds = {name.split(" ", 1)[0] for name in product}
    terminalreporter.section("simt: CUDA on a CPU", sep="-")
    terminalreporter.write_line(
        f"{len(kernels)} kernels in {len(instantiations)} instantiations, in the builds "
        f"{', '.join(sorted(builds)) or 'none'}; {len(_totals.get('schedules', ()))} schedules, "
        f"{len(_totals.get('mutants', ()))} mutants, "
        f"{len(_totals.get('planted', ()))} runs of planted mistakes"
    )
    for line in sorted(_totals.get("sanitized", ())):
        terminalreporter.write_line(f"in processes of their own: {line}")
