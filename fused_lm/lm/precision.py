"""In which number format a step computes: autocast, and loss scaling where the format needs it.

Weights, optimizer and checkpoint are fp32 always. bf16 has fp32's range. fp16 has not: gradients
below 6e-8 would become zeros, so the loss is multiplied by a scale that falls whenever a gradient
overflows (that step is left out) and grows again after 2000 steps that fit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fused_lm.lm.settings import TrainError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A settled format ("fp32", "bf16" or "fp16") on a kind of device ("cpu", "cuda")."""

    name: str
    device_type: str

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a model computes in this format."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, _DTYPES[self.name])

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """A scaler of the loss, for fp16 only."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def pick_precision(name: str, device: torch.device) -> Precision:
    """The format that ``name`` means on a device: "auto" is bf16 on GPUs that have it, else fp32.

    Raises:
        TrainError: If there is no such format, or the GPU has none.
    """
    if name not in PRECISIONS:
        raise TrainError(f"the precision is one of {', '.join(PRECISIONS)}; got {name!r}.")
    has_bf16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if name == "auto":
        name = "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    if name == "bf16" and not has_bf16:
        raise TrainError("this GPU has no bf16; give --precision fp16 or fp32.")
    return Precision(name, device.type)
