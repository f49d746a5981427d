"""The project's CUDA operators on a GPU, with the face of the harness (:mod:`tests.simt.runtime`):
the same tables of calls run on both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from build_tools.cubin import short_name
from fused_lm.cuda import extension
from tests.simt import backend as simt

HAS_GPU = torch.cuda.is_available()
PROBLEM = extension.refusal_on("cuda", 0) if HAS_GPU else "no GPU"
"""Why no CUDA kernel runs on a GPU here, None if they do."""
CUDA = simt.BACKENDS if not HAS_GPU else ("cuda",) if PROBLEM is None else ()
"""The backends that run CUDA kernels in the ordinary tests: on a GPU, or else on the harness."""
INTERPRETER = () if HAS_GPU else ("triton",)
"""For the parameters of a test whose tensors are on a CPU: Triton, where it runs there."""
TRITON_LATER = ("triton",) if HAS_GPU else (pytest.param("triton", marks=pytest.mark.slow),)
"""For modules, whose operators' own tests run there: in the interpreter `make test-all` does."""
needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="Triton compiles for the GPU here")
ALIGNMENT = 16


def harness_later(backends: Sequence[str]) -> list[Any]:
    """Backends as parameters of a test that waits for `make test-all` on the harness."""
    return [pytest.param(b, marks=pytest.mark.slow) if b in simt.BACKENDS else b for b in backends]


def fp16_later(calls: Iterable[Any], kernels: Sequence[Any]) -> list[Any]:
    """Those of the ``kernels`` for fp16, whose lines bf16 runs, wait for `make test-all`."""
    return [
        pytest.param(
            call,
            id=call.why,
            marks=[pytest.mark.slow] if call in kernels and call.dtype == torch.float16 else [],
        )
        for call in calls
    ]


def a_third(calls: Iterable[Any]) -> list[Any]:
    """Calls of which two of three wait for `make test-all`: for a second test of what a first one
    runs all of.
    """
    return [
        pytest.param(call, id=call.why, marks=[pytest.mark.slow] if i % 3 else [])
        for i, call in enumerate(calls)
    ]


def shared_bytes() -> int:
    """What a block may have here; 0 without a GPU."""
    if not HAS_GPU:
        return 0
    return int(torch.cuda.get_device_properties(0).shared_memory_per_block_optin)


def is_hopper() -> bool:
    """Whether the GPU here runs what is built for sm_90a."""
    if not HAS_GPU or PROBLEM is not None:
        return False
    return extension.target_for(torch.cuda.get_device_capability()) == "sm_90"


def call(op: str, *arguments: Any) -> Any:
    """``cuda_<op>`` on copies of the tensors, with their strides and alignment; waits, so that a
    kernel's mistake is raised here. Results come back as CPU tensors with the strides they had.
    """
    inputs = [moved(a) for a in arguments]
    with torch.no_grad(), kernels_noted():
        results = extension.op(op)(*inputs)
        torch.cuda.synchronize()
    if isinstance(results, Tensor):
        return _with_strides(results, "cpu")
    return [_with_strides(result, "cpu") for result in results]


@contextmanager
def kernels_noted() -> Iterator[None]:
    """Appends this project's kernels that run meanwhile to the file that FUSED_LM_TEST_KERNELS
    names, if it does; by CUPTI, which shares no process with compute-sanitizer.
    """
    file = os.environ.get("FUSED_LM_TEST_KERNELS")
    if file is None:
        yield
        return
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
    names = {short_name(e.name) for e in seen.events() or () if "fused_lm::" in e.name}
    with Path(file).open("a") as out:
        out.write("".join(f"{name}\n" for name in sorted(names)))


def moved(value: Any) -> Any:
    """A tensor's copy on the GPU, as it lies; anything else as it is."""
    return _with_strides(value, "cuda") if isinstance(value, Tensor) else value


def _with_strides(t: Tensor, device: str) -> Tensor:
    """A copy on a device: the memory from the first to the last element, as it lies."""
    if t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    lead = t.data_ptr() % ALIGNMENT // t.element_size()
    memory = torch.empty(lead + extent, dtype=t.dtype, device=device)
    memory[lead:].copy_(t.as_strided((extent,), (1,), t.storage_offset()))
    return memory.as_strided(t.shape, t.stride(), lead)
