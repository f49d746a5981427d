"""``simt_plain``, ``simt_race`` and ``simt_asan`` as backends of the ordinary operator tests.

``use_backend("simt_race")`` works only inside :func:`installed`: ``FUSED_LM_BACKEND`` and users do
not know these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from fused_lm import dispatch
from fused_lm.cuda import extension, ffn, linear_cross_entropy
from fused_lm.ops import (
    attention_backends,
    attention_decode_checks,
    attention_varlen_checks,
    linear_checks,
    linear_residual_checks,
    registration,
)
from fused_lm.ops.schemas import CUDA_SCHEMAS
from tests.simt import build, runtime

PREFIX = "simt_"
PROBLEM = build.unavailable()
_NAMES = ("asan",) if runtime.sanitized() else ("plain", "race")
BACKENDS = tuple(PREFIX + name for name in _NAMES) if PROBLEM is None else ()
"""For the parameters of a test: the builds that can run in this process."""
ONE = tuple(name for name in BACKENDS if name == PREFIX + runtime.ONE)
"""The same, for tests that are run on one of them."""


@contextmanager
def installed(backend: str, seed: int = 0) -> Iterator[runtime.Harness]:
    """Makes a backend known to dispatch, and gives it the schedule of a seed."""
    harness = runtime.load(backend.removeprefix(PREFIX))
    harness.configure(runtime.Schedule.of_seed(seed))
    tables, names = dict(dispatch.TABLE), dispatch.BACKENDS
    functions = _functions(harness)
    try:
        dispatch.BACKENDS = (backend, *names)
        for op, function in functions.items():
            registration.FUNCTIONS[op][backend] = function
            public = op.removesuffix("_fwd")
            if public in tables:
                refuses = _LIMITS.get(public, _fp64_refuses)
                impl = dispatch.Impl(backend, refuses, needs_record=True)
                dispatch.TABLE[public] = (impl, *tables[public])
        yield harness
    finally:
        dispatch.BACKENDS = names
        dispatch.TABLE.update(tables)
        for op in functions:
            registration.FUNCTIONS[op].pop(backend, None)
        harness.configure()


def _functions(harness: runtime.Harness) -> dict[str, Callable[..., Any]]:
    """The kernels by operator, and what fused_lm/cuda makes of them."""
    call = harness.call
    found: dict[str, Callable[..., Any]] = {}
    for op in (name.removeprefix("cuda_") for name in CUDA_SCHEMAS):
        if op not in _INSIDE:
            found[op] = partial(_on_hopper, harness, op) if op in _ON_HOPPER else partial(call, op)
    return found | {op: partial(_of_parts, harness, whole) for op, whole in _OF_PARTS.items()}


_INSIDE = {"attention_bwd_sm90", "ffn_dpre", "cross_entropy_rows_in_place"}
"""No operators of their own: the backend ``cuda`` takes them within others."""
_ON_HOPPER = (
    *("attention_varlen_fwd", "attention_varlen_bwd"),
    *("linear_act_fwd", "linear_act_bwd", "linear_act_bwd_add"),
    *("linear_residual_fwd", "linear_residual_bwd"),
)
"""Operators whose kernels for Hopper run here; those for other GPUs are tested apart."""
_OF_PARTS: dict[str, Callable[..., Any]] = {
    "ffn_fwd": ffn.ffn_forward,
    "ffn_bwd": ffn.ffn_backward,
    "ffn_bwd_add": ffn.ffn_backward,
    "linear_cross_entropy_fwd": linear_cross_entropy.linear_cross_entropy_forward,
    "linear_cross_entropy_bwd": linear_cross_entropy.linear_cross_entropy_backward,
}


def _on_hopper(harness: runtime.Harness, op: str, *arguments: Any) -> Any:
    with harness.choosing(hopper=True):
        return harness.call(op, *arguments)


def _of_parts(harness: runtime.Harness, whole: Callable[..., Any], *arguments: Any) -> Any:
    with mock.patch.object(extension, "op", lambda op: partial(_on_hopper, harness, op)):
        return whole(*arguments)


_LIMITS = {
    "attention": attention_backends.cuda_limit,
    "attention_weights": attention_backends.cuda_limit,
    "attention_decode": attention_decode_checks.cuda_limit,
    "attention_varlen": attention_varlen_checks.cuda_limit,
    "linear_act": linear_checks.cuda_limit,
    "ffn": linear_checks.cuda_limit,
    "linear_residual": linear_residual_checks.cuda_limit,
}


def _fp64_refuses(call: Any) -> str | None:
    dtypes = {value.dtype for value in call if isinstance(value, torch.Tensor)}
    dtypes |= {value for value in call if isinstance(value, torch.dtype)}
    if torch.float64 in dtypes:
        return "the CUDA kernels compute in fp32; float64 runs through the reference"
    return None if call[0].is_cpu else "simt runs on CPU tensors"
