"""``simt_plain``, ``simt_race`` and ``simt_asan`` as backends of the ordinary operator tests.

``use_backend("simt_race")`` works only inside :func:`installed`: ``FUSED_LM_BACKEND`` and users do
not know these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fused_lm import dispatch
from fused_lm.cuda import linear_cross_entropy
from fused_lm.ops import (
    attention_backends,
    attention_decode_checks,
    attention_varlen_checks,
    registration,
)
from fused_lm.ops.schemas import CUDA_SCHEMAS
from fused_lm.reference.attention_varlen import backward_by
from tests.simt import build, runtime

PREFIX = "simt_"
PROBLEM = build.unavailable()
_NAMES = ("asan",) if runtime.sanitized() else ("plain", "race")
BACKENDS = tuple(PREFIX + name for name in _NAMES) if PROBLEM is None else ()
"""For the parameters of a test: the builds that can run in this process."""


@contextmanager
def installed(backend: str, seed: int = 0) -> Iterator[runtime.Harness]:
    """Makes a backend known to dispatch, and gives it the schedule of a seed."""
    harness = runtime.load(backend.removeprefix(PREFIX))
    harness.configure(runtime.Schedule.of_seed(seed))
    tables, names = dict(dispatch.TABLE), dispatch.BACKENDS
    ops = [name.removeprefix("cuda_") for name in CUDA_SCHEMAS if name not in _INSIDE]
    try:
        dispatch.BACKENDS = (backend, *names)
        for op in ops:
            registration.FUNCTIONS[op][backend] = partial(harness.call, op)
            public = op.removesuffix("_fwd")
            if public in tables:
                refuses = _LIMITS.get(public, _fp64_refuses)
                impl = dispatch.Impl(backend, refuses, needs_record=True)
                dispatch.TABLE[public] = (impl, *tables[public])
        # One has kernels for Hopper alone, and a backward that fused_lm/cuda makes of attention's.
        registration.FUNCTIONS["attention_varlen_fwd"][backend] = partial(_on_hopper, harness)
        registration.FUNCTIONS["attention_varlen_bwd"][backend] = partial(
            backward_by, partial(harness.call, "attention_bwd")
        )
        _install_linear_cross_entropy(backend, harness)
        yield harness
    finally:
        dispatch.BACKENDS = names
        dispatch.TABLE.update(tables)
        for op in (*ops, "attention_varlen_bwd", *_LINEAR):
            registration.FUNCTIONS[op].pop(backend, None)
        harness.configure()


_INSIDE = {"cuda_attention_bwd_sm90", "cuda_cross_entropy_rows_in_place"}
"""No operators of their own: the backend ``cuda`` takes one on a Hopper, and one for each chunk of
a linear layer's loss.
"""
_LINEAR = ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd")


def _install_linear_cross_entropy(backend: str, harness: runtime.Harness) -> None:
    rows_in_place = partial(harness.call, "cross_entropy_rows_in_place")
    walks = (linear_cross_entropy.forward_by, linear_cross_entropy.backward_by)
    for op, walk in zip(_LINEAR, walks, strict=True):
        registration.FUNCTIONS[op][backend] = partial(walk, rows_in_place)
    impl = dispatch.Impl(backend, _fp64_refuses, needs_record=True)
    others = dispatch.TABLE["linear_cross_entropy"]
    dispatch.TABLE["linear_cross_entropy"] = (impl, *others)


def _on_hopper(harness: runtime.Harness, *arguments: Any) -> Any:
    with harness.choosing(hopper=True):
        return harness.call("attention_varlen_fwd", *arguments)


_LIMITS = {
    "attention": attention_backends.cuda_limit,
    "attention_weights": attention_backends.cuda_limit,
    "attention_decode": attention_decode_checks.cuda_limit,
    "attention_varlen": attention_varlen_checks.cuda_limit,
}


def _fp64_refuses(call: Any) -> str | None:
    dtypes = {value.dtype for value in call if isinstance(value, torch.Tensor)}
    dtypes |= {value for value in call if isinstance(value, torch.dtype)}
    if torch.float64 in dtypes:
        return "the CUDA kernels compute in fp32; float64 runs through the reference"
    return None if call[0].is_cpu else "simt runs on CPU tensors"
