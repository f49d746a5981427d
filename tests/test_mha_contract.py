"""nn.MultiheadAttention, stock and ours side by side: random modules, calls, masks, dtypes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import taken
from tests.gpu import CUDA
from tests.mha_cases import MASKS, PADDINGS, WRONG, Case, compare
from tests.simt import backend as simt

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HARNESS = tuple(name for name in CUDA if name in simt.ONE)
BACKENDS = ("auto", "pytorch", "reference", "triton", *HARNESS, *(() if HARNESS else CUDA))
SUITE = "MultiheadAttention against stock"
PARTS = 4
"""The cases come in parts, so that processes share them."""


@st.composite
def cases(draw: Any, backend: str) -> Case:
    """Any case that the backend can take, and one in ten that torch refuses."""
    cuda = backend in CUDA
    dtypes = DTYPES[1:3] if cuda else DTYPES[:3] if backend == "triton" else DTYPES
    boolean = st.booleans()
    dtype = draw(st.sampled_from(dtypes))
    mask = draw(st.sampled_from(MASKS))
    wrong = draw(st.sampled_from(("",) * 9 + ("some",)))
    return Case(
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((8, 16) if cuda else (4, 8, 16))),
        kdim=draw(st.sampled_from((None, None, 6))),
        vdim=draw(st.sampled_from((None, None, 10))),
        bias=draw(boolean),
        add_bias_kv=draw(st.sampled_from((False, False, True))),
        add_zero_attn=draw(st.sampled_from((False, False, True))),
        batch_first=draw(boolean),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.5 if backend in ("auto", "pytorch") else 0.0))),
        N=draw(st.sampled_from((None, 1, 2, 2, 3))),
        T=draw(st.integers(1, 9)),
        S=draw(st.integers(1, 9)),
        same=draw(st.sampled_from(("qkv", "qkv", "kv", ""))),
        mask=mask,
        padding=draw(st.sampled_from(PADDINGS)),
        hides_rows=draw(boolean),
        need_weights=draw(boolean),
        average=draw(boolean),
        is_causal=mask.startswith("causal") and draw(boolean),
        training=draw(boolean),
        grad=draw(st.sampled_from((True, True, False))),
        autocast=dtype == torch.float32 and draw(st.sampled_from((False, False, True))),
        dtype=dtype,
        wrong=draw(st.sampled_from(WRONG)) if wrong else "",
        seed=draw(st.integers(0, 2**20)),
    ).normal()


def _compare_many(backend: str, part: int, count: int, device: torch.device) -> None:
    device = CPU if backend in HARNESS else device

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(backend))
    def each(case: Case) -> None:
        running = simt.installed(backend, case.seed) if backend in HARNESS else nullcontext()
        with running:
            if case.wrong:
                compare(case, backend, device)
                return
            with taken.watched(SUITE, backend, f"{part} {case}") as choices:
                compare(case, backend, device)
        assert backend == "auto" or {chosen for _, chosen in choices} <= {backend, "reference"}
        assert bool(choices) == (backend not in ("auto", "pytorch")) or device.type != "cpu"

    each.hypothesis.inner_test._hypothesis_internal_add_digest = f"{backend}{part}".encode()
    each()


@pytest.mark.parametrize("name", BACKENDS)
def test_stock_and_ours_side_by_side(name: str, device: torch.device) -> None:
    _compare_many(name, 0, 12 if name == "triton" else 25, device)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, PARTS + 1))
@pytest.mark.parametrize("name", BACKENDS)
def test_stock_and_ours_side_by_side_at_length(name: str, part: int, device: torch.device) -> None:
    _compare_many(name, part, 40 if name == "triton" else 120, device)
