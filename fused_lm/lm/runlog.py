"""The log of a run: one JSON object per line, so that a cut-off line loses only itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fused_lm.lm.atomic import write_atomically

FILE_NAME = "log.jsonl"


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Entries of a log; lines that aren't whole JSON objects are skipped. [] without a log."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


class RunLog:
    """Appends to a log, flushing every line.

    A log must not end a run: when a line can't be written (full disk), it is dropped, and
    ``problem`` says why until a later line succeeds.
    """

    def __init__(
        self, path: Path, keep_up_to_step: int | None = None, keep_final: bool = True
    ) -> None:
        """Opens the log.

        Args:
            path: The file; its folder exists.
            keep_up_to_step: None empties it; otherwise entries of later steps are dropped, since a
                resumed run takes those steps again.
            keep_final: Whether to keep a final evaluation at that very step, which a run that was
                killed between it and its last checkpoint makes again.
        Raises:
            OSError: If the file can't be opened for writing.
        """
        kept = [] if keep_up_to_step is None else read_log(path)
        kept = [e for e in kept if e.get("step", 0) <= (keep_up_to_step or 0)]
        if not keep_final:
            kept = [e for e in kept if not (e.get("final") and e["step"] == keep_up_to_step)]
        write_atomically(path, "".join(json.dumps(e) + "\n" for e in kept).encode())
        self.path = path
        self.entries = kept
        self.problem: str | None = None
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path} can't be written ({error.strerror or error})"

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as problem:
            self.problem = f"{self.path} can't be written ({problem.strerror or problem})"
