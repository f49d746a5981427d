"""Scores at which the roundings of an exponent matter: the CUDA attention's forward on the harness,
and a backward from its own results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_lm.reference import attention as reference
from fused_lm.tolerance import check_close
from tests.attention_bwd_calls import Call, dout_of
from tests.attention_calls import F16, data_of
from tests.simt import backend as simt
from tests.simt import runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
CALLS = [
    Call("scores of 1e6", 37, 70, size=1000.0, dlse=False),
    Call("scores of 1e6, general", 37, 70, size=1000.0, key_mask=True, dlse=False),
    Call("scores of 1e6 for one key", 37, 1, size=1000.0, dlse=False),
    Call("scores of 1e9", 37, 200, dtype=F16, size=1.2e4, dlse=False),
    Call("scores of 1e11, general", 37, 70, size=1e5, key_mask=True, dlse=False),
]


ROWS = [
    Call("a warp alone", 40, 200),
    Call("a warp alone, general", 40, 200, softcap=1e6),
    Call("a team", 40, 200, 192, H=1),
    Call("a team, general", 40, 200, 128, H=1, softcap=1e6),
]


def _forward_and_backward(harness: Any, call: Call) -> list[Tensor]:
    data, dout = data_of(call), dout_of(call)
    out, lse = harness.call("attention_fwd", *data)
    gradients = harness.call("attention_bwd", dout, None, *data[:3], out, lse, *data[3:], False)
    return [out, lse, *gradients[:3]]


def _reference(call: Call, dtype: torch.dtype | None) -> list[Tensor]:
    def cast(value: object) -> object:
        wide = isinstance(value, Tensor) and value.is_floating_point() and dtype is not None
        return value.to(dtype) if wide else value

    torch.manual_seed(0)
    data = [cast(value) for value in data_of(call)]
    dout = cast(dout_of(call))
    out, lse = reference.attention_forward(*data)
    gradients = reference.attention_backward(dout, None, *data[:3], out, lse, *data[3:], False)
    return [out, lse, *gradients[:3]]


def check(harness: Any, call: Call) -> None:
    """On the harness, or on a GPU (:mod:`tests.gpu`)."""
    torch.manual_seed(0)
    results = _forward_and_backward(harness, call)
    same, exact = _reference(call, None), _reference(call, torch.float64)
    for name, *tensors in zip(("out", "lse", "dq", "dk", "dv"), results, same, exact, strict=True):
        check_close(*tensors, name)


@pytest.mark.parametrize("backend", simt.BACKENDS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_large_scores(call: Call, backend: str) -> None:
    check(runtime.load(backend.removeprefix(simt.PREFIX)), call)


def check_rows(harness: Any, call: Call) -> None:
    """A row's bits are its own, also where a neighbour's maximum grows so far that the sums of the
    warp are scaled.
    """
    torch.manual_seed(0)
    q, k, *rest = data_of(call)
    k[..., call.S // 2 :, :] *= 1.5  # maxima grow in later tiles, by less than 2^8
    before = harness.call("attention_fwd", q, k, *rest)
    q[..., 5, :] *= 40
    after = harness.call("attention_fwd", q, k, *rest)
    others = torch.arange(call.T) != 5
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, others], b[:, :, others])
        assert not torch.equal(a[:, :, 5], b[:, :, 5])


@pytest.mark.parametrize("backend", simt.BACKENDS)
@pytest.mark.parametrize("call", ROWS, ids=lambda call: call.why)
def test_rows_have_bits_of_their_own(call: Call, backend: str) -> None:
    check_rows(runtime.load(backend.removeprefix(simt.PREFIX)), call)


@pytest.mark.parametrize("backend", simt.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, F16], ids=str)
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -1e9, -1e4], ids=str)
def test_a_row_that_a_bias_hides(least: float, dtype: torch.dtype, backend: str) -> None:
    """As masks of nn.Transformer's users are: the row is a mean of values, and nothing is NaN."""
    harness = runtime.load(backend.removeprefix(simt.PREFIX))
    q, k, v, dout = (torch.randn(1, 1, 8, 32).to(dtype) for _ in range(4))
    bias = torch.zeros(1, 1, 8, 8)
    bias[..., 0, :] = least
    dout[..., 0, :] = 0
    score = (None, None, bias, None, None, None, 32**-0.5, 0.0, 0.0)
    out, lse = harness.call("attention_fwd", q, k, v, *score)
    gradients = harness.call("attention_bwd", dout, None, q, k, v, out, lse, *score, True)
    for result in (out, lse, *gradients):
        assert result.isfinite().all()
    assert not gradients[0][..., 0, :].any(), "a row without a gradient gets none"
    if least < -1e8:  # its scores are alike: the mean of all values
        mean = v.double().mean(2, keepdim=True)[..., 0, :]
        torch.testing.assert_close(out[..., 0, :].double(), mean, atol=0.02, rtol=0.02)
