"""Checks that several operators share; every message is one sentence with what was got and
expected.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shapes_of(**tensors: Tensor | None) -> str:
    """``q [2, 8, 16, 64], k [2, 8, 16, 64]`` for messages."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if t is not None)


def check_same_device(tensors: dict[str, Tensor]) -> None:
    """TypeError unless all tensors live on one device."""
    first = next(iter(tensors.values())).device
    for t in tensors.values():
        if t.device != first:
            places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise TypeError(f"all tensors must be on one device, got {places}")


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch raises where it is asked about ``meta``."""
    if not _is_any_autocast_enabled():
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_dropout(p: float) -> None:
    """ValueError unless ``p`` is a probability."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p}")


def check_rng(rng: Tensor, like: Tensor) -> None:
    """``rng`` must be what :func:`fused_lm.make_rng` returns, on the device of ``like``."""
    if rng.dtype != torch.int64:
        raise TypeError(f"rng must be int64 (see fused_lm.make_rng), got {rng.dtype}")
    if rng.shape != (4,):
        raise ValueError(
            "rng must be [4] = (seed, offset, head offset, row offset), got " + shapes_of(rng=rng)
        )
    check_same_device({"input": like, "rng": rng})


def triton_refusal(t: Tensor) -> str | None:
    """Why no Triton kernel can run on the device of ``t``, None if one can."""
    return _triton_refusal_on(t.device.type, t.device.index)


def _triton_refusal_on(kind: str, index: int | None) -> str | None:
    if not _has_triton():
        return "triton is not installed: pip install triton"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        if torch.version.hip is None and major < 8:
            return f"Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
        return None
    if kind == "cpu" and interpreting():
        return None
    return f"Triton kernels run on CUDA devices, got a {kind} tensor"


_triton_refusal_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_allowed(t: Tensor) -> bool:
    """Whether torch would multiply this tensor in TF32; asks by the newer of torch's two settings,
    because the older one raises once a user has set the newer.
    """
    if not t.is_cuda or t.dtype != torch.float32:
        return False
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def interpreting() -> bool:
    """True where Triton's kernels run in its interpreter, as in the tests on a CPU."""
    return "triton" in sys.modules and bool(sys.modules["triton"].knobs.runtime.interpret)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
