"""The harness' tables of calls on a GPU: every kernel and branch that this GPU runs against fp64,
and the same bits from run to run. Which of two kernels runs may depend on how much shared memory a
block can have: those of other GPUs are the harness' alone.

``python -m benchmarks.gpu_calls racecheck --out DIR`` looks for races in them, some at once; what
it says about ``norm_bwd`` is discussed in benchmarks/LOG.md, 2026-11-26. A sanitizer needs no call
twice: FUSED_LM_TEST_REPEATS=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_lm.cuda.attention import IN_ANY_ORDER, IN_ORDER
from fused_lm.reference import attention as reference
from fused_lm.reference import attention_decode as decode_reference
from fused_lm.reference import attention_varlen as varlen_reference
from fused_lm.reference import cross_entropy as loss_reference
from fused_lm.tolerance import check_close
from tests import attention_bwd_calls as backward_calls
from tests import attention_calls, gpu
from tests import attention_decode_calls as decode_calls
from tests import attention_varlen_bwd_calls as varlen_backward_calls
from tests import attention_varlen_calls as varlen_calls
from tests import linear_act_hopper_calls as linear_calls
from tests import test_simt_attention_extremes as extremes
from tests import test_simt_attention_weights as weights
from tests import test_simt_cross_entropy as losses
from tests import test_simt_layernorm as norms
from tests import test_simt_linear_residual as residuals
from tests.attention_bwd_hopper_calls import HOPPER_CALLS as HOPPER_BACKWARD_CALLS
from tests.attention_hopper_calls import HOPPER_CALLS
from tests.simt import runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.PROBLEM is not None, reason=str(gpu.PROBLEM))]
REPEATS = int(os.environ.get("FUSED_LM_TEST_REPEATS", "3"))


def _repeated(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The results of one run, if the others give the same bits, NaN's too."""
    first = run()
    for _ in range(1, REPEATS):
        for a, b in zip(first, run(), strict=True):
            assert same_bits(a, b), "two runs differ"
    return first


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def _ids(call: Any) -> str:
    return str(call.why)


def _own(calls: Sequence[Any]) -> list[Any]:
    """Without those that are there for a GPU with another size of shared memory."""
    sizes = (runtime.LARGE_SHARED, gpu.shared_bytes())
    return [call for call in calls if call.shared_bytes in sizes]


@pytest.mark.parametrize("call", _own([*attention_calls.CALLS, *HOPPER_CALLS]), ids=_ids)
def test_attention_forward(call: attention_calls.Call) -> None:
    data = attention_calls.data_of(call)
    results = _repeated(lambda: gpu.call("attention_fwd", *data))
    same, exact = reference.attention_forward(*data), attention_calls.in_fp64(data)
    for i, name in enumerate(("out", "lse")):
        check_close(results[i], same[i], exact[i], name)


@pytest.mark.parametrize("call", _own(backward_calls.CALLS), ids=_ids)
def test_attention_backward(call: backward_calls.Call) -> None:
    data = backward_calls.Data.of(call)
    results = _repeated(lambda: gpu.call("attention_bwd", *data.arguments))
    for i, name in enumerate(("dq", "dk", "dv", "dbias")):
        check_close(results[i], data.same[i], data.exact[i], name)
        assert results[i].stride() == data.same[i].stride()


@pytest.mark.parametrize("call", _own([*backward_calls.CALLS, *HOPPER_BACKWARD_CALLS]), ids=_ids)
def test_attention_backward_in_any_order(call: backward_calls.Call) -> None:
    """On a Hopper dq's last bits may differ from run to run, the others' not."""
    data = backward_calls.Data.of(call)
    runs = [gpu.call("attention_bwd_sm90", *data.arguments, IN_ANY_ORDER) for _ in range(REPEATS)]
    for results in runs:
        for i, name in enumerate(("dq", "dk", "dv", "dbias")):
            check_close(results[i], data.same[i], data.exact[i], name)
            assert results[i].stride() == data.same[i].stride()
            assert i == 0 or same_bits(results[i], runs[0][i]), f"two runs differ in {name}"


@pytest.mark.parametrize("slots", [IN_ORDER, 1, 3])
@pytest.mark.parametrize("call", _own(HOPPER_BACKWARD_CALLS), ids=_ids)
def test_attention_backward_in_order(call: backward_calls.Call, slots: int) -> None:
    data = backward_calls.Data.of(call)
    results = _repeated(lambda: gpu.call("attention_bwd_sm90", *data.arguments, slots))
    for i, name in enumerate(("dq", "dk", "dv", "dbias")):
        check_close(results[i], data.same[i], data.exact[i], name)


@pytest.mark.parametrize("call", weights.CALLS, ids=_ids)
def test_attention_weights(call: weights.Call) -> None:
    data = weights.data_of(call)
    results = _repeated(lambda: [gpu.call("attention_weights_fwd", *data.arguments())])
    same = reference.attention_weights_forward(*data.arguments())
    check_close(results[0], same, data.exact())


@pytest.mark.parametrize("call", [*decode_calls.CALLS, *decode_calls.LONG], ids=_ids)
def test_attention_decode(call: decode_calls.Call) -> None:
    data = decode_calls.data_of(call)
    results = _repeated(lambda: gpu.call("attention_decode_fwd", *data))
    same, exact = decode_reference.attention_decode_forward(*data), decode_calls.formula(*data)
    for i, name in enumerate(("out", "lse")):
        check_close(results[i], same[i], exact[i], name)


@pytest.mark.skipif(not gpu.is_hopper(), reason="the kernels are for Hopper")
@pytest.mark.parametrize("call", [*varlen_calls.CALLS, *varlen_calls.LONG], ids=_ids)
def test_attention_varlen(call: varlen_calls.Call) -> None:
    data = varlen_calls.data_of(call)
    results = _repeated(lambda: gpu.call("attention_varlen_fwd", *data))
    same = varlen_reference.attention_varlen_forward(*data)
    exact = varlen_calls.formula(*data)
    for i, name in enumerate(("out", "lse")):
        check_close(results[i], same[i], exact[i], name)


@pytest.mark.skipif(not gpu.is_hopper(), reason="the kernels are for Hopper")
@pytest.mark.parametrize("call", varlen_backward_calls.CALLS, ids=_ids)
def test_attention_varlen_backward(call: varlen_calls.Call) -> None:
    """dq's last bits may differ from run to run, the others' not."""
    data = varlen_backward_calls.Data.of(call)
    runs = [gpu.call("attention_varlen_bwd", *data.arguments) for _ in range(REPEATS)]
    for results in runs:
        for i, name in enumerate(("dq", "dk", "dv")):
            check_close(results[i], data.same[i], data.exact[i], name)
            assert i == 0 or same_bits(results[i], runs[0][i]), f"two runs differ in {name}"


@pytest.mark.parametrize("call", linear_calls.FORWARDS, ids=_ids)
def test_linear_act(call: linear_calls.Call) -> None:
    data = linear_calls.Data.of(call)
    linear_calls.check_forward(data, *_repeated(lambda: gpu.call("linear_act_fwd", *data.forward)))


@pytest.mark.parametrize("call", [c for c in linear_calls.BACKWARDS if not c.total], ids=_ids)
def test_linear_act_backward(call: linear_calls.Call) -> None:
    data = linear_calls.Data.of(call)
    arguments = data.backward(data.saved())
    found = _repeated(lambda: gpu.call("linear_act_bwd", *arguments))
    linear_calls.check_backward(data, found)


@pytest.mark.parametrize("call", [c for c in linear_calls.BACKWARDS if c.total], ids=_ids)
def test_linear_act_adds_into_a_given_gradient(call: linear_calls.Call) -> None:
    data = linear_calls.Data.of(call)
    arguments = [gpu.moved(a) for a in data.backward(data.saved())[:-1]]

    def run() -> list[Tensor]:
        total = gpu.moved(linear_calls.total_of(data))
        with torch.no_grad(), gpu.kernels_noted():
            dx, _, dbias = gpu.extension.op("linear_act_bwd_add")(*arguments, False, total)
        return [dx.cpu(), total.cpu(), dbias.cpu()]

    linear_calls.check_backward(data, _repeated(run))


@pytest.mark.parametrize("call", residuals.CALLS, ids=_ids)
def test_linear_residual(call: residuals.Call) -> None:
    (y,) = _repeated(lambda: [gpu.call("linear_residual_fwd", *call.forward)])
    residuals.check_forward(call, y)
    found = _repeated(lambda: gpu.call("linear_residual_bwd", *call.backward))
    residuals.check_backward(call, found)


@pytest.mark.parametrize("call", linear_calls.BACK_THROUGH, ids=_ids)
def test_back_through_an_activation(call: linear_calls.Call) -> None:
    data = linear_calls.Data.of(call)
    linear_calls.check_dpre(data, _repeated(lambda: gpu.call("ffn_dpre", *data.dpre)))


@pytest.mark.skipif(not gpu.is_hopper(), reason="the kernels are for Hopper")
@pytest.mark.parametrize("call", varlen_calls.POISONED, ids=_ids)
def test_packed_neighbours_stay_outside(call: varlen_calls.Call) -> None:
    varlen_calls.check_neighbours(lambda *data: gpu.call("attention_varlen_fwd", *data), call)


@pytest.mark.parametrize("call", extremes.CALLS, ids=_ids)
def test_large_scores(call: backward_calls.Call) -> None:
    extremes.check(gpu, call)


@pytest.mark.parametrize("call", extremes.ROWS, ids=_ids)
def test_rows_have_bits_of_their_own(call: backward_calls.Call) -> None:
    extremes.check_rows(gpu, call)


@pytest.mark.parametrize("call", norms.CALLS, ids=_ids)
def test_norms(call: norms.Call) -> None:
    data = norms.data_of(call)
    norms.check(data, _repeated(lambda: norms.run(gpu, data)))


@pytest.mark.parametrize("call", _own(losses.CALLS), ids=_ids)
def test_cross_entropy(call: losses.Call) -> None:
    data = losses.data_of(call)
    losses.check(data, _repeated(lambda: losses.run(gpu, data)))


@pytest.mark.parametrize("call", _own(losses.CALLS), ids=_ids)
def test_cross_entropy_in_place(call: losses.Call) -> None:
    """The same bits as in other memory, and those of a finished gradient that is scaled."""
    data = losses.data_of(call)
    _, apart, _ = losses.run(gpu, data)
    logits = data.logits.cuda()
    target, loss = data.target.cuda(), torch.empty(call.N, device="cuda")
    options = (*data.options[:-1], True)
    weights = None
    if call.reduction == "mean":
        count = loss_reference.inverse_count(data.target, losses.IGNORED).float()
        weights = count.cuda().expand(call.N)
    with gpu.kernels_noted():
        gpu.extension.op("cross_entropy_rows_in_place")(logits, target, loss, weights, *options)
    assert same_bits(logits.cpu(), apart)
    with gpu.kernels_noted():
        gpu.extension.op("cross_entropy_scale_in_place")(logits, torch.tensor(2.0, device="cuda"))
    loss_reference.scale_in_place(apart, torch.tensor(2.0))
    assert same_bits(logits.cpu(), apart)
