"""What a user may set about a run, and the first look at the machine and at the run's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_lm.lm import checkpoint
from fused_lm.lm.atomic import temporary_beside
from fused_lm.lm.checkpoint import Checkpoint

if TYPE_CHECKING:
    from fused_lm.lm.parallel import Team

Emit = Callable[[dict[str, Any]], None]


class TrainError(RuntimeError):
    """A run can't start or go on; the message is one sentence with what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; None means: derive it.

    Attributes:
        out: Folder of the run.
        steps, minutes: Length, at most one of them; minutes count from the call, with everything.
        tokenizer, vocab_size: "bytes" or "bpe", and the most tokens of the latter.
        batch, lr, warmup: Windows per step, peak rate, steps of warm-up.
        grad_clip: Largest norm of a gradient.
        accumulate: Parts in which each process reads its share of a batch, to need less memory.
        precision: "auto", "fp32", "bf16" or "fp16", see :func:`precision.pick_precision`.
        compile: Whether ``torch.compile`` fuses each block.
        parallel: "auto", "none", "ddp" or "fsdp", see :func:`parallel.join`.
        model_fields: Fields of GPTConfig that every candidate of a sized run shall have.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        log_every, eval_every, save_every: Steps; by default about 200 log lines, at most 20
            evaluations that take at most a tenth of the time, and a save a minute.
        eval_tokens, final_eval_tokens: Validation tokens per evaluation on the way and at the end.
        resume, overwrite: What to do with a run that is in ``out``; by default it is an error.
        plot: Whether to draw the curve at the end.
        tensorboard: Whether to write what is logged for TensorBoard too.
    """

    out: Path
    steps: int | None = None
    minutes: float | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    batch: int | None = None
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    grad_clip: float | None = None
    accumulate: int | None = None
    precision: str | None = None
    compile: bool | None = None
    parallel: str = "auto"
    seed: int = 0
    model_fields: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    eval_tokens: int = 32768
    final_eval_tokens: int = 131072
    resume: bool = False
    overwrite: bool = False
    plot: bool = True
    tensorboard: bool = False


def pick_device(name: str) -> torch.device:
    """The device that ``name`` means here; each process of a ``torchrun`` has a GPU of its own.

    Raises:
        TrainError: If it doesn't exist on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise TrainError(
            f"the device {name!r} can't be used here; expected one of {here}."
        ) from error
    return device


@contextmanager
def claimed(out: Path, team: Team) -> Iterator[None]:
    """Keeps other runs out of a folder while this one lasts.

    Raises:
        TrainError: A run is going on there, or the folder can't be written.
    """
    held: list[int] = []
    team.from_first(lambda: held.append(_locked(out)))
    try:
        yield
    finally:
        for handle in held:
            os.close(handle)


def _locked(out: Path) -> int:
    """A handle of the folder, locked until it is closed."""
    import fcntl

    _make_writable(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise TrainError(
            f"another run is going on in {out}; expected another folder with --out."
        ) from None
    except OSError:  # a file system without locks
        return handle
    for left in out.glob(".*.tmp"):  # of writers who were killed: nobody else writes here now
        with suppress(OSError):
            left.unlink()
    return handle


def _make_writable(out: Path) -> None:
    probe = temporary_beside(out / "writable")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        os.unlink(probe)
    except OSError as error:
        reason = error.strerror or error
        raise TrainError(
            f"{out} can't be written ({reason}); expected a writable folder."
        ) from error


def open_folder(config: TrainConfig) -> Checkpoint | None:
    """Makes the run's folder and looks at what is in it.

    Returns:
        The checkpoint to resume from, or None for a new run.
    Raises:
        TrainError: If a run is there and the settings don't say what to do, or none is to resume,
            or the folder can't be written.
        CheckpointError: If the run there can't be read.
    """
    out = config.out
    file = out / checkpoint.FILE_NAME
    if config.resume:
        if not file.is_file():
            raise TrainError(
                f"{out} holds no checkpoint to resume; start the run without --resume."
            )
        found = checkpoint.read_checkpoint(file, training_state=True)
    else:
        found = None
        if file.exists() and not config.overwrite:
            raise TrainError(
                f"{out} already holds a run; expected --resume to go on with it, "
                "--overwrite to replace it, or another folder with --out."
            )
    _make_writable(out)
    return found
