"""What the host side of a launch shares: the GPU's SMs and shared memory, the current device, rows.

Without a GPU the answers are those for the interpreter, or for the target of a compilation.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

INTERPRETER_SMS = 2
"""Stands for the SM count where there is no GPU: small, and more than one strip."""

_KIB = 1024
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory one program can have, by compute capability."""


def shared_memory_limit(arch: int) -> int:
    """Bytes one program can have; an unknown target gets what all known ones have."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values())) * _KIB


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; a small constant in the interpreter."""
    if device.type != "cuda":
        return INTERPRETER_SMS
    return _cuda_multiprocessors(device)


@functools.cache
def _cuda_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_of(t: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, as a launch needs it."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@overload
def rows_contiguous(t: Tensor) -> Tensor: ...
@overload
def rows_contiguous(t: None) -> None: ...
def rows_contiguous(t: Tensor | None) -> Tensor | None:
    """The tensor, or one contiguous copy where its columns are not adjacent."""
    return t if t is None or t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()
