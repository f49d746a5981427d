"""``linear_cross_entropy``: whose products run, how long their sums are, how large the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lm.ops.registration import function_of
from fused_lm.parity.cross_entropy_cases import formula
from fused_lm.reference.linear_cross_entropy import (
    CHUNK_BYTES,
    LEAST_ROWS,
    PREFERRED_ROWS,
    SUM_TERMS,
    rows_per_chunk,
)
from tests.gpu import CUDA, harness_later

SLOW_KERNELS = harness_later(("reference", "triton", *CUDA))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _inputs(
    N: int, C: int, V: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and target."""
    x, weight = (torch.randn(n, C, device=device).to(dtype) for n in (N, V))
    return x, weight, torch.randint(V, (N,), device=device)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator of torch's returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


class _Longest(TorchDispatchMode):
    """Terms of the longest sum of a matrix product."""

    terms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.overloadpacket.__name__:
            self.terms = max(self.terms, args[-1].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_fp32_sums_over_the_vocabulary_are_made_in_parts(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """cuBLAS errs by the length of a sum; sums that are rounded to 16 bits must not be cut."""
    V = 2 * SUM_TERMS + 8  # C = 2: torch's products in every backend
    x, weight, target = _inputs(3, 2, V, dtype, device)
    forward = function_of("linear_cross_entropy_fwd", backend)
    options = (-100, 0.0, 0.0, 0.0, "sum", None, True, True, False)
    with torch.no_grad(), _Longest() as seen:
        forward(x, weight, None, target, *options)
    assert seen.terms == (SUM_TERMS if dtype == F32 else V)


@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize(
    ("dtype", "C", "V", "ours"),
    [(BF16, 8, 40, True), (F16, 16, 8, True), (BF16, 8, 37, False), (F32, 8, 40, False)],
)
def test_whose_products_run(
    dtype: torch.dtype, C: int, V: int, ours: bool, backend: str, device: torch.device
) -> None:
    x, weight, target = _inputs(6, C, V, dtype, device)
    forward = function_of("linear_cross_entropy_fwd", backend)
    with torch.no_grad(), _Longest() as seen:
        forward(x, weight, None, target, -100, 0.0, 0.0, 0.0, "sum", 4, True, True, False)
    assert (seen.terms == 0) == ours


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist_whole(reduction: str, backend: str, device: torch.device) -> None:
    N, V, C, chunk = 96, 50, 4, 16
    x, weight, target = _inputs(N, C, V, BF16, device)
    inputs = (x, weight, torch.randn(V, device=device).to(BF16))
    forward, backward = (
        function_of(f"linear_cross_entropy_{way}", backend) for way in ("fwd", "bwd")
    )
    options = (-100, 0.1, 0.01, 5.0, reduction, chunk, True, True, True)
    with torch.no_grad(), _Largest() as seen:
        forward(*inputs, target, *options)
        dloss = torch.ones(() if reduction == "mean" else N, device=device)
        backward(dloss, *inputs, target, *options)
    assert 2 * chunk * V <= seen.nbytes <= 4 * chunk * V < 2 * N * V
    with torch.no_grad(), _Largest() as seen:
        formula(F.linear(*inputs), target)
    assert seen.nbytes >= 2 * N * V


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("V", [2, 256, 50257, 131072, 262144, 1 << 20])
def test_chunk_formula(V: int, itemsize: int) -> None:
    for N in [*range(1, 66), *range(2500, 30000, 97), 5119, 5120, 8192, 16384, 10**6, 10**7]:
        rows = rows_per_chunk(N, V, itemsize)
        chunks = -(-N // rows)
        assert 1 <= rows <= N or N == 1
        if chunks == 1:
            assert rows == N < 2 * LEAST_ROWS
            continue
        assert rows % 128 == 0 and rows >= LEAST_ROWS
        # The last chunk may be short by what rounding up to whole GEMM tiles took from it.
        assert N - (chunks - 1) * rows > LEAST_ROWS - 128 * chunks or rows - 128 < N / chunks
        assert rows <= PREFERRED_ROWS or N // rows < 2
        if rows > 2 * LEAST_ROWS:
            assert rows * V * itemsize <= CHUNK_BYTES
    assert rows_per_chunk(0, V, itemsize) == 1
    assert rows_per_chunk(16384, 50257, 2) == 4096
