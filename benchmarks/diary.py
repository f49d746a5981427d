"""What a race has written down, line by line, and what follows from it for the process after one
that hung, crashed or was cut.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

MOST_HANGS = 2
"""After so many cases that it hung in or crashed, a contestant is left out of all others."""


class Event(str, Enum):
    """In the life of a case."""

    START = "start"  # of a process at it
    BEGUN = "begun"  # a contestant's first step
    TIMES = "times"  # are taken, of all that passed
    CUT = "cut"  # the time was over
    DONE = "done"


def whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Without one that a kill or a full disk has torn."""
    for text in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


class Diary:
    """The lines of one GPU, torch and commit in a file, by case. Each is there at once."""

    def __init__(self, file: Path | None, head: dict[str, Any]) -> None:
        self.file, self.head, self.begin = file, head, time.monotonic()
        self.lines: dict[str, list[dict[str, Any]]] = {}
        if file is not None and file.is_file():
            if not file.read_bytes().endswith(b"\n"):
                with file.open("a") as out:
                    out.write("\n")  # behind a torn line
            for line in whole_lines(file):
                if all(line.get(name) == head[name] for name in ("gpu", "torch", "commit")):
                    self.lines.setdefault(line["case"], []).append(line)

    def write(self, line: dict[str, Any]) -> None:
        """With the seconds since the process began: what the minutes went to."""
        line = {**self.head, **line, "at": round(time.monotonic() - self.begin, 1)}
        self.lines.setdefault(line["case"], []).append(line)
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps(line) + "\n")

    def is_done(self, case: str) -> bool:
        return any(line.get("event") == Event.DONE for line in self.lines.get(case, ()))

    def results(self, case: str) -> list[dict[str, Any]]:
        """Numbers and problems; of what was measured again, the last ones."""
        found: dict[tuple[str | None, str | None], dict[str, Any]] = {}
        for line in self.lines.get(case, ()):
            if "event" not in line:
                found[line.get("contestant"), line.get("pass")] = line
        return [*found.values()]

    def ended_in_times(self, case: str) -> bool:
        """Whether two processes have: nobody knows by whom."""
        lines = [line.get("event") for line in self.lines.get(case, ())]
        began, cut = lines.count(Event.TIMES), lines.count(Event.CUT)
        return began - cut >= MOST_HANGS

    def hung_in(self, case: str) -> set[str]:
        """With whom a process ended: nothing follows the contestant's begin, or another process."""
        lines = [*self.lines.get(case, ()), {"event": Event.START}]
        return {
            line["contestant"]
            for line, then in itertools.pairwise(lines)
            if line.get("event") == Event.BEGUN and then.get("event") == Event.START
        }

    def left_out(self, case: str) -> dict[str, str]:
        """Contestants that this case goes without, and why."""
        hangs = collections.Counter(name for other in self.lines for name in self.hung_in(other))
        often = {name: count for name, count in hangs.items() if count >= MOST_HANGS}
        reasons = {name: f"hung or crashed in {count} cases" for name, count in often.items()}
        return reasons | dict.fromkeys(self.hung_in(case), "hung or crashed")
