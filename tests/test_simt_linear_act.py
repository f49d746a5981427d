"""Hopper's products of a linear layer on the harness: the same bits in every schedule, right ones,
bytes moved, and every synchronisation dropped in turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from build_tools.cubin import short_name
from tests.golden import compiled_kernels
from tests.linear_act_hopper_calls import (
    ACTIVATION,
    BACK_THROUGH,
    BACKWARDS,
    BF16,
    FORWARDS,
    GATED,
    GRADIENT,
    INSTANTIATIONS,
    KINDS,
    LINEAR,
    SHARED,
    SHARED_GATED,
    Call,
    Data,
    check_backward,
    check_dpre,
    check_forward,
    total_of,
)
from tests.linear_act_runs import Products, in_schedules, parameters, same_bits
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
PRODUCTS = Products(hopper=True)
BLOCK_M, BLOCK_K, PRODUCT_ROWS, GROUP_THREADS = 128, 64, 64, 128
"""Of csrc/kernels/gemm_tiles_sm90.h."""
WORD = 4
"""Bytes of bias that a thread reads at once."""
FEW = [
    call
    for call in FORWARDS
    if (call.N <= 40 and call not in SHARED[2:4]) or call in INSTANTIATIONS[::4]
]
FEW_BACKWARDS = [
    call
    for call in BACKWARDS
    if call.N <= 130 or (call.total is not None and call.dtype == BF16 and call.sms == 2)
]
FEW_BACK_THROUGH = [
    call for call in BACK_THROUGH if call.N <= 100 or (call.dtype == BF16 and call.sms == 2)
]
"""In `make test`."""


@pytest.mark.parametrize("call", parameters(FORWARDS, FEW))
def test_forward(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    y, pre = in_schedules(harness, PRODUCTS.forward, data)
    check_forward(data, y, pre)


@pytest.mark.parametrize("call", parameters(BACKWARDS, FEW_BACKWARDS))
def test_backward(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    found = in_schedules(harness, PRODUCTS.backward, data)
    check_backward(data, found)


@pytest.mark.parametrize("call", parameters(BACK_THROUGH, FEW_BACK_THROUGH))
def test_back_through_an_activation(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    found = in_schedules(harness, PRODUCTS.back_through, data)
    check_dpre(data, found)


def test_weights_that_lie_otherwise(harness: runtime.Harness) -> None:
    """Turned, or with rows apart: read as they lie, and the gradient lies likewise; x whose columns
    are apart and bias at an odd address are copied. All equal to their copies, to the bit.
    """
    data = Data.of(Call("lies otherwise", 70, 72, 48, "silu"))
    plain = [*PRODUCTS.forward(harness, data), *PRODUCTS.backward(harness, data)]
    wide = torch.zeros(48, 80, dtype=BF16)
    wide[:, :72] = data.weight
    for weight in (data.weight.T.contiguous().T, wide[:, :72]):
        x = data.x.T.contiguous().T
        assert data.bias is not None
        bias = torch.cat([data.bias[:1], data.bias])[1:]
        other = Data(data.call, x, weight, bias, data.dy)
        found = [*PRODUCTS.forward(harness, other), *PRODUCTS.backward(harness, other)]
        assert all(same_bits(a, b) for a, b in zip(plain, found, strict=True))
        assert found[3].stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("total", ["turned", "odd"])
def test_totals_that_lie_otherwise(total: str, harness: runtime.Harness) -> None:
    data = Data.of(Call("totals", 70, 72, 48, total=torch.float32))
    arguments = data.backward(data.saved())[:-1]
    plain = total_of(data).contiguous()
    other = torch.zeros(48, 73)[:, 1:] if total == "odd" else torch.zeros(72, 48).T
    other.copy_(plain)
    for weight_grad in (plain, other):
        PRODUCTS.call(harness, "linear_act_bwd_add", *arguments, False, weight_grad)
    assert torch.equal(plain, other)


def test_no_rows(harness: runtime.Harness) -> None:
    data = Data.of(Call("no rows", 0, 72, 48, "silu", keep_pre=True))
    y, pre = PRODUCTS.forward(harness, data)
    assert y.shape == pre.shape == (0, 48)
    dx, dweight, dbias = PRODUCTS.call(harness, "linear_act_bwd", *data.backward(pre))
    assert dx.shape == (0, 72) and not dweight.any() and not dbias.any()
    assert dweight.shape == (48, 72) and dbias.shape == (48,)


def test_nan_stays_in_its_row(harness: runtime.Harness) -> None:
    for activation in ("relu", "silu", "gelu"):
        data = Data.of(Call("nan", 140, 72, 48, activation))
        data.x[7, 3] = float("nan")
        y, _ = PRODUCTS.forward(harness, data)
        assert y[7].isnan().all() and y.isnan().sum() == 48


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"C": 12}, "multiples of 8"),
        ({"F": 20}, "multiples of 8"),
        ({"dtype": torch.float32}, "bfloat16 and float16"),
        ({"F": 12, "activation": "swiglu"}, "for gates and values"),
        ({"activation": "tanh"}, "no activation tanh"),
    ],
)
def test_refuses(changed: dict[str, Any], says: str, harness: runtime.Harness) -> None:
    sizes = {"N": 16, "C": 16, "F": 16} | changed
    with pytest.raises(RuntimeError, match=says):
        PRODUCTS.forward(harness, Data.of(Call("refused", **sizes)))


def _counted(call: Call) -> tuple[dict[str, int], dict[str, Any]]:
    """What a forward moves, and how its tiles are dealt out."""
    harness = runtime.load("race")
    with harness.counting(hopper=True, multiprocessors=call.sms) as counts:
        harness.call("linear_act_fwd", *Data.of(call).forward)
    plan = harness.module.gemm_plan_sm90(call.N, call.F, call.C, call.work, call.sms)
    return counts, plan


@needs_race
@pytest.mark.parametrize("call", [SHARED[0], SHARED[4]], ids=lambda call: call.why)
def test_shared_tiles_move_their_parts_besides(call: Call) -> None:
    """Once written, once read, whatever lies outside of the matrix left out."""
    counts, plan = _counted(call)
    M, N, K = call.N, call.F, call.C
    assert plan["whole"] == 0 and plan["blocks"] == plan["slots"] == call.sms
    sums = 4 * M * N * plan["slots"]
    assert counts["global_read_bytes"] == 2 * (M * K + N * K) + sums + 2 * M * N
    assert counts["global_write_bytes"] == 2 * M * N * (1 + call.keep_pre) + sums
    products = -(-K // BLOCK_K)
    assert counts["wgmma_flops"] == products * 2 * BLOCK_M * plan["block_n"] * BLOCK_K
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


def test_shared_calls_are_shared() -> None:
    plan = runtime.load(runtime.ONE).module.gemm_plan_sm90
    for call in [*SHARED, *SHARED_GATED]:
        found = plan(call.N, call.F, call.C, call.work, call.sms)
        assert found["slots"] and bool(found["whole"]) == ("whole" in call.why), call.why


@needs_race
@pytest.mark.parametrize("call", parameters(KINDS, KINDS[1::2]))
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas at the top of the kernel; of a gated layer some values are read as gates
    too, behind the last ones.
    """
    counts, tuning = _counted(call)
    M, N, K = call.N, call.parts * call.F, call.C
    block_n = tuning["block_n"]
    clusters, tiles_n, k_tiles = (
        -(-M // (BLOCK_M * tuning["cluster"])), -(-N // block_n), -(-K // BLOCK_K)
    )  # fmt: skip
    tiles_m = clusters * tuning["cluster"]
    threads = GROUP_THREADS * (1 if tuning["ping_pong"] else 2)
    rows_of_b = N if call.work != GATED else call.F + min(tiles_n * block_n // 2, N)
    operands = 2 * (M * K * tiles_n + rows_of_b * K * clusters)
    assert counts["global_read_bytes"] == operands + tiles_m * threads * N // 8 * WORD
    assert counts["global_write_bytes"] == 2 * M * (call.F + call.keep_pre * N)
    products = tiles_m * tiles_n * k_tiles
    assert counts["wgmma_flops"] == products * 2 * BLOCK_M * block_n * BLOCK_K
    rows = BLOCK_M // PRODUCT_ROWS
    assert counts["wgmma_shared_bytes"] == products * rows * (PRODUCT_ROWS + block_n) * 2 * BLOCK_K
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(PRODUCTS.forward, hunt.harness, Data.of(call)))
    for call in _MUTATED_BACK_THROUGH:
        hunt.drop_each(call.why, partial(PRODUCTS.back_through, hunt.harness, Data.of(call)))
    for call in _MUTATED_BACKWARDS:
        hunt.drop_each(call.why, partial(PRODUCTS.backward, hunt.harness, Data.of(call)))
    sources = mutants.sources_of("gemm_sm90*") | mutants.sources_of("activation_bwd*")
    problems = hunt.problems(sources - {mutants.CSRC / "common/warp.h"})
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("cooperative, four tiles a block", 400, 400, 504),
    Call("ping-pong, four tiles a block, both kept", 900, 400, 200, "silu", keep_pre=True),
    Call("ping-pong, an odd number of slabs", 900, 72, 184, "silu"),
    Call("small ping-pong", 900, 72, 120, "gelu", keep_pre=True),
    Call("shared", 200, 1200, 40, "silu", keep_pre=True, sms=12),
    Call("gated, four tiles a block", 400, 400, 328, "swiglu", keep_pre=True),
    Call("gated, shared", 40, 1200, 200, "swiglu", keep_pre=True, sms=12),
]
_MUTATED_BACK_THROUGH = [
    Call("back through", 900, 72, 184, "silu"),
    Call("shared, back through", 200, 1000, 40, "silu", sms=12),
    Call("back through gates", 900, 72, 184, "swiglu"),
    Call("shared, back through gates", 200, 1000, 40, "swiglu", sms=12),
]
_MUTATED_BACKWARDS = [
    Call("gradients of gates", 200, 264, 200, "swiglu"),
    Call("gradients", 200, 264, 200, "silu"),
    Call("added", 300, 200, 264, total=torch.float32),
]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name; residuals have a test of their own."""
    compiled = {
        name for name in compiled_kernels(("gemm_sm90", "activation_bwd")) if "Residual" not in name
    }
    harness = runtime.load(runtime.ONE)
    for call in [*INSTANTIATIONS, *SHARED[:4], *SHARED_GATED]:
        PRODUCTS.forward(harness, Data.of(call))
    for call in BACKWARDS:
        PRODUCTS.backward(harness, Data.of(call))
    for call in BACK_THROUGH:
        PRODUCTS.back_through(harness, Data.of(call))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert compiled and not compiled - ran, f"no call reaches {sorted(compiled - ran)}"


def test_schedules_are_chosen_for_their_clocks() -> None:
    """By the model in gemm_tuning_sm90.h, on two multiprocessors."""
    plan = runtime.load(runtime.ONE).module.gemm_plan_sm90
    assert plan(4096, 4096, 4096, "linear")["block_n"] == 256
    assert plan(4096, 4096, 4096, "activation")["block_n"] == 192
    assert plan(4096, 128, 4096, "linear")["block_n"] == 128
    assert plan(4096, 128, 4096, "activation")["block_n"] == 128
    assert plan(64, 64, 1024, GRADIENT)["block_n"] == 192
    assert plan(4096, 128, 4096, GATED)["block_n"] == 256
    works = (LINEAR, ACTIVATION, GRADIENT, GATED, "backward", "gated backward")
    assert all(plan(8, 8, 8, work)["reason"] for work in works)


H200 = 132
"""Multiprocessors."""


@pytest.mark.parametrize(
    ("M", "N", "K", "work", "whole", "slots"),
    [
        (3072, 768, 16384, LINEAR, 0, 203),  # GPT-2's weights: 72 tiles
        (3072, 768, 16384, GRADIENT, 0, 203),
        (6400, 1600, 16384, LINEAR, 264, 217),  # two waves, and 86 tiles
        (16, 768, 3072, LINEAR, 0, 134),  # a few new tokens
        (16384, 3072, 768, ACTIVATION, 2048, 0),  # waves enough
        (16384, 768, 3072, LINEAR, 384, 0),
        (16, 5632, 2048, GATED, 0, 175),  # a few new tokens: 44 tiles
    ],
)
def test_tiles_that_do_not_come_out_even_are_shared(
    M: int, N: int, K: int, work: str, whole: int, slots: int
) -> None:
    plan = runtime.load(runtime.ONE).module.gemm_plan_sm90(M, N, K, work, H200)
    assert (plan["whole"], plan["slots"]) == (whole, slots)
    assert plan["blocks"] == (H200 if slots else 0)
