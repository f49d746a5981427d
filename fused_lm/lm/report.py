"""What a run tells: events to its caller, lines to its log, scalars to TensorBoard, the curve."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fused_lm.lm import plot
from fused_lm.lm.runlog import FILE_NAME as LOG_NAME
from fused_lm.lm.runlog import RunLog
from fused_lm.lm.settings import Emit, TrainError

TENSORBOARD_FOLDER = "tensorboard"
_NOT_DRAWN = ("step", "kind", "final")


class Report:
    """The outlets of one run; a context manager, which closes them.

    Args:
        folder: Of the run.
        emit: Receives the events.
        resumed_step: None for a new run; otherwise what was logged of later steps is dropped.
        finished: Whether the resumed run had been at its end; if not, a final evaluation that it
            logged is dropped too.
        tensorboard: Whether to write event files below ``folder``/tensorboard.
    Raises:
        TrainError: If log or events can't be written. ImportError: without TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        emit: Emit,
        resumed_step: int | None,
        finished: bool,
        tensorboard: bool,
    ) -> None:
        self.folder, self.emit = folder, emit
        self.path = folder / LOG_NAME
        self._writer: Any = None
        try:
            self._log = RunLog(self.path, resumed_step, finished)
        except OSError as error:
            raise TrainError(
                f"{self.path} can't be written ({error.strerror or error}); "
                "expected a writable folder."
            ) from error
        if tensorboard:
            # Scalars of these steps and later ones, by the run before this one, are hidden.
            purged = (resumed_step or 0) + 1
            name = str(folder / TENSORBOARD_FOLDER)
            try:
                self._writer = import_tensorboard()(name, purge_step=purged)
            except OSError as error:
                raise TrainError(
                    f"{name} can't be written ({error.strerror or error}); "
                    "expected a writable folder."
                ) from error

    def write(self, entry: dict[str, Any], **more: Any) -> None:
        """Logs an entry and emits it, with ``more``, as the event of its kind.

        A number that JSON doesn't have (inf, NaN) is logged as null.
        """
        entry = {name: _plain(value) for name, value in entry.items()}
        before = self._log.problem
        self._log.write(entry)
        if self._log.problem and not before:
            self.warn(f"{self._log.problem}; the run goes on.")
        if self._writer is not None and entry["kind"] != "begin":
            self._show(entry)
        self.emit({"event": entry["kind"], **more, **entry})

    def _show(self, entry: dict[str, Any]) -> None:
        """To TensorBoard; when that can't be written, the run goes on without it."""
        try:
            for name, value in entry.items():
                if name not in _NOT_DRAWN and isinstance(value, int | float):
                    self._writer.add_scalar(f"{entry['kind']}/{name}", value, entry["step"])
        except OSError as error:
            self.warn(f"TensorBoard gets no more ({error.strerror or error}); the run goes on.")
            self._writer = None

    def warn(self, message: str) -> None:
        """Emits a warning."""
        self.emit({"event": "warning", "message": message})

    def draw(self, title: str, levels: tuple[float, float]) -> Path | None:
        """Draws the curve of the log; what fails is only a warning."""
        path = self.folder / plot.FILE_NAME
        try:
            return plot.draw_curve(
                self._log.entries,
                path,
                title=title,
                unigram_bits=levels[0],
                bigram_bits=levels[1],
            )
        except (ImportError, OSError) as error:
            self.warn(f"{path} was not drawn ({error}).")
            return None

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.__exit__(kind, error, trace)
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def import_tensorboard() -> Any:
    """The class that writes event files; its import takes seconds.

    Raises:
        ModuleNotFoundError: Without TensorBoard.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(str(error), name="tensorboard") from error
    return SummaryWriter


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
