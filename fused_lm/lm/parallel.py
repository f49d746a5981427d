"""Several processes that train one model, as ``torchrun`` starts them.

    ddp     every process holds the model; gradients are averaged (DistributedDataParallel)
    fsdp    every process holds a part of weights, gradients and moments (``fully_shard``)

A batch is the same whatever the number of processes: each reads its share of it. The first process
(rank 0) plans, logs and saves; the others are told what it decided. A checkpoint holds the whole
model, so that any number of processes, one included, can go on from it.

If a process ends, the others' next exchange fails, and ``torchrun`` ends them too; if one only
hangs, the exchange fails after :data:`TIMEOUT`.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_lm.lm.checkpoint import CheckpointError
from fused_lm.lm.settings import TrainError
from fused_lm.lm.text import DataError

KINDS = ("auto", "none", "ddp", "fsdp")
TIMEOUT = timedelta(minutes=10)
_STARTED_BY = "torchrun --nproc-per-node 2 -m fused_lm train"

T = TypeVar("T")


class PeerError(RuntimeError):
    """The first process met an error and has reported it; this one only ends too."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them.

    Attributes:
        kind: "none", "ddp" or "fsdp".
        rank, size: Of this process, and how many there are.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the first process, which alone calls it.

        Raises:
            Exception: In the first process, what ``function`` raised. PeerError: in the others.
        """
        if self.kind == "none":
            return function()
        outcome: list[Any] = [None, None]
        caught: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                caught, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if caught is not None:
            raise caught
        if outcome[1] is not None:
            raise PeerError(outcome[1])
        return outcome[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, added up over all processes in fp64."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.kind != "none" else list(values)

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        if self.kind == "none":
            return value
        return bool(self._reduced([float(value)], dist.ReduceOp.MAX)[0])

    def decide(self, progress: float, save: bool, stop: bool) -> tuple[float, bool, bool]:
        """Progress and whether to save, as the first process sees it; a stop if any wants it."""
        if self.kind == "none":
            return progress, save, stop
        own = [progress, float(save)] if self.is_first else [-1.0, 0.0]
        progress, saved, stopped = self._reduced([*own, float(stop)], dist.ReduceOp.MAX)
        return progress, bool(saved), bool(stopped)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A CPU tensor of every process, by rank, in every process."""
        if self.kind == "none":
            return [tensor]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, tensor)
        return found

    def wrap(self, root: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Makes ``root`` train in all processes; its weights must be the same in each.

        Args:
            root: Forward gives the loss; on its device.
            blocks: Parts of it that are gathered one at a time under "fsdp".
        Returns:
            What to call in a training step. ``root`` itself stays what to evaluate.
        """
        device = next(root.parameters()).device
        if self.kind == "ddp":
            ids = [device] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(root, ids)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # It warns of in-place operations on a block's output; this model has none.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            mesh = init_device_mesh(device.type, (self.size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(root, mesh=mesh)
        return root

    def gradients(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one part of a batch: only the last one's exchanges."""
        if self.kind == "ddp" and not last:
            return module.no_sync()  # type: ignore[operator]
        if self.kind == "fsdp":
            module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return tensor.tolist()


SOLO = Team()


@contextmanager
def join(kind: str, device: torch.device) -> Iterator[Team]:
    """The team of this process, for as long as the context is open.

    Args:
        kind: "auto" is "ddp" under ``torchrun`` and "none" otherwise.
        device: Of this process; exchanges go over nccl for a GPU and over gloo for a CPU.
    Raises:
        TrainError: If kind and launch don't fit, or another process was lost.
    """
    kind = _checked(kind)
    if kind == "none":
        yield SOLO
        return
    ours = not dist.is_initialized()
    try:
        if ours:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        yield Team(kind, dist.get_rank(), dist.get_world_size())
    except (TrainError, PeerError, DataError, CheckpointError):
        _leave(ours)
        raise
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        # "[file:line] reason. Advice of the library."
        first_line = str(error).strip().partition("\n")[0]
        reason = re.sub(r"^\[[^]]*\] ", "", first_line).partition(". ")[0]
        raise TrainError(
            f"another process of the run has ended or hangs ({reason}); "
            "go on from its last checkpoint with --resume."
        ) from error
    # What still holds the group (a model in a cycle of references) keeps its threads alive, and
    # those abort a Python that is being torn down.
    gc.collect()
    dist.barrier()
    _leave(ours)


def _checked(kind: str) -> str:
    """The kind to be, given how this process was started."""
    if kind not in KINDS:
        raise TrainError(f"--parallel is one of {', '.join(KINDS)}; got {kind!r}.")
    launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if not dist.is_available():
        if launched:
            raise TrainError("this torch was built without torch.distributed; train without it.")
    elif dist.is_initialized():
        launched = True
    if kind == "auto":
        return "ddp" if launched else "none"
    if kind != "none" and not launched:
        raise TrainError(
            f"--parallel {kind} needs several processes; start them with {_STARTED_BY} ..."
        )
    if kind == "none" and launched and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "several processes were started, but --parallel none trains in one; "
            "expected ddp, fsdp or auto."
        )
    return kind


def _leave(ours: bool) -> None:
    if ours and dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
