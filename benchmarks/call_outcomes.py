"""A plugin of pytest's: ``-p benchmarks.call_outcomes --outcomes FILE`` writes a line when a test
begins and one when it has ended, so that a process which dies or hangs has said in which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BEGUN, PASSED, FAILED, SKIPPED = "begun", "passed", "failed", "skipped"
SAID = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, BEGUN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a set-up, a call or what follows: a failure of any, and the call's success."""
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr) if report.failed else ""
            self._write(report.nodeid, report.outcome, said=" ".join(said.split())[:SAID])

    def _write(self, call: str, outcome: str, **more: Any) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"call": call, "outcome": outcome, **more}) + "\n")
