"""Stages of the GPU suite: each a process of its own, with a limit of its own, so that a crash or a
hang of one never loses the others. What a stage finds it writes itself, step by step, into a folder
of its own; here is only how it went, which is on disk after every stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

LOG = "log.txt"
GRACE_SECONDS = 3.0
"""Between the signal that a stage may still write at, and the one that it can't hear."""
HEADLINE = 100


class Status(str, Enum):
    """How a stage went."""

    DONE = "done"
    FAILED = "failed"  # exit status, signal or hang; what it wrote before stays
    UNFINISHED = "unfinished"  # the time of this piece was over
    ABSENT = "absent"  # can't run here


OPEN = (None, Status.UNFINISHED)
"""Of stages that the next piece runs."""


@dataclass(frozen=True)
class Piece:
    """What a stage's command may depend on."""

    folder: Path  # its own
    seconds: float  # until it is stopped
    first: bool  # nothing of it has run yet


@dataclass(frozen=True)
class Stage:
    """One process of the suite.

    Attributes:
        command: Its arguments; exit status 0 is a success. Run again after a time that was too
            short, it goes on from what it finds in its folder.
        limit_s: After so long it counts as hung, whatever time the piece has left.
        least_s: Not begun with less time.
        headline: The last line of the log that this pattern is found in says what came out.
        silence_s: After so long without a word in its folder it is stopped. A stage with this goes
            on behind what hung, crashed or was cut in it, whatever its exit status.
        more: That line has this pattern where there is more to do: the next piece runs it again.
        refusal: Why it can't run here, None if it can.
        beside: Stages in a row with the same word here run at once. They take no times.
    """

    name: str
    command: Callable[[Piece], Sequence[str]]
    limit_s: float
    least_s: float = 5.0
    headline: str = r"\S"
    silence_s: float | None = None
    more: str | None = None
    refusal: Callable[[], str | None] = lambda: None
    beside: str = ""


@dataclass
class Outcome:
    """What the suite knows of a stage."""

    status: Status | None = None  # None: begun, and the suite was killed
    said: str = ""
    seconds: float = 0.0
    pieces: int = 0


def run(
    stage: Stage, folder: Path, seconds: float, before: Outcome, environment: Mapping[str, str]
) -> Outcome:
    """One piece of a stage, of at most ``seconds``.

    Args:
        folder: Of the suite; the stage gets ``folder / stage.name``.
        before: Of the pieces before.
        environment: Variables of its process.
    """
    try:
        why = stage.refusal()
    except RuntimeError as error:  # of a GPU that doesn't answer
        return Outcome(Status.FAILED, str(error), before.seconds, before.pieces)
    if why is not None:
        return Outcome(Status.ABSENT, why, before.seconds, before.pieces)
    limit = min(stage.limit_s, seconds)
    own = folder / stage.name
    begin = time.monotonic()
    try:
        own.mkdir(parents=True, exist_ok=True)
        command = stage.command(Piece(own, limit, before.pieces == 0))
        with (own / LOG).open("ab") as log:
            start = log.tell()
            end = _wait(command, log, limit, stage.silence_s, own, environment)
        text = (own / LOG).read_bytes()[start:].decode(errors="replace")
        status, said = _verdict(stage, end, text, limit)
    except OSError as error:  # a full disk, or a program that isn't there
        status, said = Status.FAILED, str(error)
    spent = before.seconds + time.monotonic() - begin
    return Outcome(status, said, round(spent, 1), before.pieces + 1)


class End(NamedTuple):
    """Of a process: its exit status, or why it was stopped."""

    code: int | None
    why: str = ""


def _wait(
    command: Sequence[str],
    log: Any,
    limit: float,
    silence: float | None,
    folder: Path,
    environment: Mapping[str, str],
) -> End:
    """Until it ends, or is stopped. None of its children outlives it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    _running.add(process)
    begin = time.monotonic()
    try:
        while True:
            left = begin + limit - time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return End(process.wait(max(0.0, left if silence is None else min(left, 0.5))))
            if begin + limit <= time.monotonic():
                _signal(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                return End(None, LIMIT)
            if silence is not None and _silent_since(folder, begin) > silence:
                return End(None, SILENCE)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        _running.discard(process)


LIMIT, SILENCE = "limit", "silence"


def _silent_since(folder: Path, begin: float) -> float:
    """Seconds since a file in it was written to, or a process was begun."""
    written = max((p.stat().st_mtime for p in folder.iterdir() if p.is_file()), default=0.0)
    return min(time.monotonic() - begin, time.time() - written)


_running: set[subprocess.Popen[bytes]] = set()


def stop_all() -> None:
    """Ends what runs, and all that it started."""
    for process in [*_running]:
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _verdict(stage: Stage, end: End, text: str, limit: float) -> tuple[Status, str]:
    said, code = _headline(stage, text), end.code
    if code is not None and code >= 0 and stage.more and re.search(stage.more, said):
        return Status.UNFINISHED, said
    if code == 0:
        return Status.DONE, said
    if code is None:
        if end.why == SILENCE:
            return Status.UNFINISHED, f"no word for {stage.silence_s:.0f} s; {said}"
        if limit < stage.limit_s or stage.silence_s is not None:
            return Status.UNFINISHED, f"cut after {limit:.0f} s; {said}"
        return Status.FAILED, f"no end within {limit:.0f} s; {said}"
    reason = f"exit status {code}" if code > 0 else _signal_name(-code)
    return Status.FAILED if stage.silence_s is None else Status.UNFINISHED, f"{reason}; {said}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _headline(stage: Stage, text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(stage.headline, line)]
    return (found or lines or ["nothing printed"])[-1][:HEADLINE]


def load(path: Path) -> dict[str, Outcome]:
    """Outcomes by stage, as :func:`save` wrote them."""
    outcomes = {}
    for name, line in json.loads(path.read_text())["stages"].items():
        status = None if line["status"] is None else Status(line["status"])
        outcomes[name] = Outcome(**{**line, "status": status})
    return outcomes


def save(path: Path, outcomes: Mapping[str, Outcome], about: Mapping[str, Any]) -> None:
    """Writes outcomes, and what they are about, so that a kill leaves the old file or the new."""
    stages = {name: asdict(outcome) for name, outcome in outcomes.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**about, "stages": stages}, indent=1) + "\n")
    os.replace(temporary, path)
