"""The products of linear layers for every GPU since Ampere on the harness: the same bits in every
schedule, right ones, bytes moved, and every synchronisation dropped in turn.
"""

from __future__ import annotations

from functools import partial

import pytest

from build_tools.cubin import short_name
from tests.golden import compiled_kernels
from tests.linear_act_hopper_calls import (
    ACTIVATIONS,
    BF16,
    DTYPES,
    F16,
    F32,
    Call,
    Data,
    check_backward,
    check_dpre,
    check_forward,
)
from tests.linear_act_runs import Products, in_schedules, parameters
from tests.simt import backend as simt
from tests.simt import mutants, runtime

pytestmark = pytest.mark.skipif(not simt.BACKENDS, reason=str(simt.PROBLEM))
needs_race = pytest.mark.skipif("simt_race" not in simt.BACKENDS, reason="needs the race build")
MUTANT_SCHEDULES = 6
PRODUCTS = Products(hopper=False)
BLOCK = 128
"""Rows and columns of a tile, of csrc/kernels/gemm_sm80.h."""

FORWARDS = [
    *(
        Call(f"several tiles, {name}{turned}", 200, 200, 264, "silu", dtype, transposed,
             keep_pre=True)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    *(
        Call(f"gated, {name}{turned}", 200, 200, 136, "swiglu", dtype, transposed, keep_pre=True)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    *(Call(f"{name}, kept", 40, 72, 48, name, keep_pre=True) for name in ACTIVATIONS),
    Call("gated, two columns of tiles, no bias", 70, 72, 136, "geglu", bias=False),
    Call("one row", 1, 64, 64, "gelu"),
    Call("eight of everything", 8, 8, 8, "silu", keep_pre=True),
    Call("more rows of tiles than side by side", 1200, 40, 136, "gelu"),
    Call("whole tiles", 256, 128, 256),
    Call("many steps of K", 130, 1000, 136, "gelu_tanh", F16, keep_pre=True),
    Call("no bias, turned weight", 70, 72, 264, transposed=True, bias=False),
]  # fmt: skip
BACKWARDS = [
    *(
        Call(f"gradients, {name}{added}", 200, 248, 200, "silu", dtype, total=total)
        for name, dtype in DTYPES.items()
        for added, total in (("", None), (", added into fp32", F32))
    ),
    Call("gradients of gates", 70, 72, 136, "swiglu"),
    Call("gradients, turned weight", 150, 136, 264, "gelu_tanh", transposed=True),
    Call("gradients without anything", 130, 72, 72, bias=False),
    Call("rows that are no multiple of 8", 333, 8, 16, "gelu"),
    Call("added into 16 bits, turned weight", 70, 72, 200, total=BF16, transposed=True),
]
BACK_THROUGH = [
    *(
        Call(f"back through, {name}{turned}", 200, 264, 184, "silu", dtype, transposed)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    *(
        Call(f"back through gates, {name}{turned}", 200, 264, 184, "swiglu", dtype, transposed)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    *(Call(f"back through {name}", 40, 72, 48, name) for name in ACTIVATIONS[1:]),
    Call("back through, no sums", 300, 72, 328, "gelu", bias=False),
]


def _few(calls: list[Call]) -> list[Call]:
    """In `make test`."""
    return calls[:1] + [call for call in calls[4:] if call.dtype == BF16 and call.N <= 150]


@pytest.mark.parametrize("call", parameters(FORWARDS, _few(FORWARDS)))
def test_forward(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    y, pre = in_schedules(harness, PRODUCTS.forward, data)
    check_forward(data, y, pre)


@pytest.mark.parametrize("call", parameters(BACKWARDS, _few(BACKWARDS)))
def test_backward(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    found = in_schedules(harness, PRODUCTS.backward, data)
    check_backward(data, found)


@pytest.mark.parametrize("call", parameters(BACK_THROUGH, _few(BACK_THROUGH)))
def test_back_through_an_activation(call: Call, harness: runtime.Harness) -> None:
    data = Data.of(call)
    found = in_schedules(harness, PRODUCTS.back_through, data)
    check_dpre(data, found)


def test_nan_stays_in_its_row(harness: runtime.Harness) -> None:
    data = Data.of(Call("nan", 140, 72, 48, "silu"))
    data.x[7, 3] = float("nan")
    y, _ = PRODUCTS.forward(harness, data)
    assert y[7].isnan().all() and y.isnan().sum() == 48


@needs_race
@pytest.mark.parametrize("call", [FORWARDS[0], FORWARDS[1], FORWARDS[4]], ids=lambda call: call.why)
def test_moves_exactly_its_floor(call: Call) -> None:
    """By the formulas at the top of the kernel, and bias once per thread that has 8 columns."""
    harness = runtime.load("race")
    with harness.counting(hopper=False) as counts:
        harness.call("linear_act_fwd", *Data.of(call).forward)
    M, N, K = call.N, call.parts * call.F, call.C
    tiles_m, tiles_n = -(-M // BLOCK), -(-N // BLOCK)
    operands = 2 * (M * K * tiles_n + N * K * tiles_m)
    assert counts["global_read_bytes"] == operands + 2 * M * N
    assert counts["global_write_bytes"] == 2 * M * (call.F + call.keep_pre * N)
    assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"]


@pytest.mark.slow
@needs_race
def test_no_mutant_survives() -> None:
    """Every synchronisation of the kernels, dropped in turn from the calls that pass it."""
    hunt = mutants.Hunt(runtime.load("race"), MUTANT_SCHEDULES, in_every_call=False)
    for call in _MUTATED:
        hunt.drop_each(call.why, partial(PRODUCTS.forward, hunt.harness, Data.of(call)))
    for activation in ("silu", "swiglu"):
        back = Data.of(Call(f"back through {activation}", 200, 136, 184, activation))
        hunt.drop_each(back.call.why, partial(PRODUCTS.back_through, hunt.harness, back))
    gradients = Data.of(Call("gradients", 200, 136, 200, "silu", total=F32))
    hunt.drop_each(gradients.call.why, partial(PRODUCTS.backward, hunt.harness, gradients))
    sources = mutants.sources_of("gemm_sm80*") - {mutants.CSRC / "common/warp.h"}
    problems = hunt.problems(sources)
    assert not problems, "\n".join(problems)
    assert hunt.killed, "the kernels synchronise nowhere?"


_MUTATED = [
    Call("more steps than stages", 200, 200, 264, "silu", keep_pre=True),
    Call("turned weight", 200, 136, 264, "silu", transposed=True),
    Call("gated", 200, 200, 136, "swiglu", keep_pre=True),
]


@pytest.mark.slow
def test_every_instantiation_runs() -> None:
    """What nvcc compiles is what runs here, by name; residuals have a test of their own."""
    compiled = {name for name in compiled_kernels("gemm_sm80") if "Residual" not in name}
    harness = runtime.load(runtime.ONE)
    for call in FORWARDS[:8]:
        PRODUCTS.forward(harness, Data.of(call))
    for call in BACKWARDS[:4]:
        PRODUCTS.backward(harness, Data.of(call))
    for call in BACK_THROUGH[:8]:
        PRODUCTS.back_through(harness, Data.of(call))
    ran = {short_name(name) for name in harness.module.kernels_run()}
    assert compiled and not compiled - ran, f"no call reaches {sorted(compiled - ran)}"
