"""Energy that a call takes, by the GPU's own counter (NVML), where the package that reads it
(``nvidia-ml-py``) and the counter (Volta and later) are there.

The counter is of the whole board and moves about ten times a second: calls run back to back for a
second, so that a step of it is a tenth of the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from time import perf_counter

import torch

SECONDS = 1.0


def counter() -> Callable[[], int] | None:
    """Reads the current GPU's millijoules so far; None where nobody counts."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # ImportError, or nvml's own of whatever is missing
        return None
    return lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def millijoules(call: Callable[[], None], read: Callable[[], int]) -> float:
    """Of one call, the mean over a second of them."""
    torch.cuda.synchronize()
    before, begin, calls = read(), perf_counter(), 0
    while perf_counter() - begin < SECONDS:
        call()
        calls += 1
        torch.cuda.synchronize()
    return (read() - before) / calls
