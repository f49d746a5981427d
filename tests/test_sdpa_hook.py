"""Our kernels behind torch's flash attention: the operators' overrides, on CPU tensors, for which
torch has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.nn import functional as F

import fused_lm
from fused_lm import dispatch
from fused_lm.integrations import sdpa
from fused_lm.ops import registration
from fused_lm.reference import attention as reference
from fused_lm.reference.philox import scaled_keep
from fused_lm.tolerance import check_close
from tests import oracle
from tests.gpu import HAS_GPU
from tests.simt import backend as simt

BACKENDS = ("reference", *(() if HAS_GPU else ("triton",)), *simt.BACKENDS)
F16, BF16 = torch.float16, torch.bfloat16
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
SPARE_MARKS = (1, 3)
"""Places that no backend of the product marks."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[sdpa._Overrides]:
    """The overrides for CPU tensors, also with the harness' backends."""
    monkeypatch.setattr(sdpa, "_awaited", set())
    for name, mark in zip(simt.BACKENDS, SPARE_MARKS, strict=False):
        monkeypatch.setitem(sdpa.MARKS, name, mark)
    overrides = sdpa._Overrides("CPU")
    yield overrides
    sdpa._awaited.clear()
    overrides.remove()
    if "CPU" in sdpa._backwards:
        sdpa._backwards.pop("CPU")._destroy()


class Called(NamedTuple):
    """What torch's own operator was called with."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def torch_own() -> Iterator[list[Called]]:
    """The calls of torch's own flash attention, here the reference in its layout [B, T, H, D]."""
    calls: list[Called] = []

    def tail(q: Tensor, k: Tensor, causal: bool, scale: float) -> tuple[Any, ...]:
        upper = k.shape[1] - q.shape[1] if causal else None
        return None, None, None, None, None, upper, scale, 0.0, 0.0

    def forward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append(Called("forward", args, options))
        q, k, v = (t.transpose(1, 2) for t in args[:3])
        out, lse = reference.attention_forward(q, k, v, *tail(*args[:2], args[8], options["scale"]))
        seed = torch.empty(2, dtype=torch.uint64)
        return out.transpose(1, 2), lse, seed, seed.new_empty(()), q.new_empty(0)

    def backward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append(Called("backward", args, options))
        dout, q, k, v, out = (t.transpose(1, 2) for t in args[:5])
        rest = tail(*args[1:3], args[11], options["scale"])
        found = reference.attention_backward(dout, None, q, k, v, out, args[5], *rest, False)
        return tuple(t.transpose(1, 2) for t in found[:3])

    library = Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    yield calls
    library._destroy()


class Case(NamedTuple):
    """One attention; ``why`` is what it is there for."""

    why: str
    dtype: torch.dtype
    T: int = 24
    S: int = 24
    H: int = 2
    Hkv: int = 2
    causal: bool = False
    scale: float | None = None


CASES = [
    Case("plain", F16),
    Case("causal, GQA", BF16, H=4, causal=True),
    Case("causal is bottom-right here, as causal_lower_right wants it", F16, T=9, causal=True),
    Case("causal, rows without a key", BF16, S=9, causal=True),
    Case("scale, MQA, T != S", BF16, S=40, Hkv=1, scale=0.7),
]


def _qkv(case: Case) -> list[Tensor]:
    shapes = ((2, case.H, case.T, 16), (2, case.Hkv, case.S, 16), (2, case.Hkv, case.S, 16))
    return [torch.randn(shape).to(case.dtype) for shape in shapes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula(hook: sdpa._Overrides, backend: str, case: Case) -> None:
    inputs = _qkv(case)
    visible = torch.ones(case.T, case.S, dtype=torch.bool)
    visible = visible.tril(case.S - case.T) if case.causal else visible
    visible = visible.expand(2, case.H, -1, -1)

    def ours(*qkv: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return FORWARD(*qkv, is_causal=case.causal, scale=case.scale)[:1]

    def formula(*qkv: Tensor) -> tuple[Tensor, ...]:
        return oracle.attention(*qkv, visible=visible, scale=case.scale)[:1]

    oracle.check_against_oracle(ours, formula, inputs, ("out", "dq", "dk", "dv"))
    with fused_lm.use_backend(backend):
        lse = FORWARD(*inputs, is_causal=case.causal, scale=case.scale)[1]
    plain, exact = (
        oracle.attention(*(t.to(dtype) for t in inputs), visible=visible, scale=case.scale)[1]
        for dtype in (torch.float32, torch.float64)
    )
    check_close(lse, plain, exact, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_mask_of_its_state(hook: sdpa._Overrides, backend: str) -> None:
    case = Case("dropout", F16, T=20, S=33)
    inputs, dropout_p = _qkv(case), 0.4

    def ours(*qkv: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        with fused_lm.use_backend(backend):
            return FORWARD(*qkv, dropout_p)[:1]

    torch.manual_seed(3)
    with fused_lm.use_backend(backend):
        _, lse, *_, state, _, _ = FORWARD(*inputs, dropout_p)
        rng = F.pad(state.view(torch.int64), (0, 2))
        q, k, v = inputs
        weights = fused_lm.attention_weights(
            q, k, lse, dropout_p=dropout_p, rng=rng, average_heads=False
        )
    keep = scaled_keep(rng, 2, 2, 20, 33, dropout_p, torch.float64)
    assert 0.2 < (keep == 0).double().mean() < 0.6
    exact = oracle.attention(*(t.double() for t in inputs), keep=keep)[0]
    check_close(weights @ v, oracle.attention(*inputs, keep=keep.to(F16))[0], exact, "weights @ v")
    oracle.check_against_oracle(
        ours,
        lambda *qkv: oracle.attention(*qkv, keep=keep.to(qkv[0].dtype))[:1],
        inputs,
        ("out", "dq", "dk", "dv"),
    )


def test_the_seed_of_torch_decides_the_mask(hook: sdpa._Overrides) -> None:
    inputs = _qkv(Case("dropout", F16))
    outputs = []
    with fused_lm.use_backend("reference"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs += [FORWARD(*inputs, 0.5)[0], FORWARD(*inputs, 0.5)[0]]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[4])


def test_auto_runs_torch_s_own(hook: sdpa._Overrides, torch_own: list[Called]) -> None:
    case = CASES[2]
    q, k, v = (t.requires_grad_() for t in _qkv(case))
    result = FORWARD(q, k, v, 0.0, True, scale=0.5)
    with fused_lm.use_backend("reference"):
        expected = FORWARD(q, k, v, 0.0, True, scale=0.5)[0]
        gradients = torch.autograd.grad(expected.sum(), (q, k, v))
    own = torch.autograd.grad(result[0].sum(), (q, k, v))
    assert torch.equal(result[0], expected)
    assert all(torch.equal(t, other) for t, other in zip(own, gradients, strict=True))
    assert result[2:6] == (None, None, case.T, case.S)

    forward, backward = torch_own
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    assert (forward.name, backward.name) == ("forward", "backward")
    assert _same(forward.args[:3], rows)
    assert forward.args[3:] == (None, None, case.T, case.S, 0.0, True, False)
    assert forward.options == backward.options == {"scale": 0.5}
    out, lse, seed, unused = result[0], result[1], result[6], result[7]
    assert _same(backward.args[1:6], (*rows, out.transpose(1, 2), lse))
    assert backward.args[6:12] == (None, None, case.T, case.S, 0.0, True)
    assert backward.args[12].data_ptr() == seed.data_ptr()
    assert backward.args[13].data_ptr() == unused.data_ptr()


def _same(found: Any, expected: Any) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in pairs)


def test_what_torch_does_not_give_to_flash_is_torch_s_own(
    hook: sdpa._Overrides, torch_own: list[Called]
) -> None:
    half = _qkv(CASES[0])
    with fused_lm.use_backend("reference"):
        FORWARD(*half, scale=1.0)
        assert not torch_own
        FORWARD(*half, 0.1, False, True, scale=1.0)
        FORWARD(*(t.float() for t in half), scale=1.0)
        FORWARD(half[0], half[1], half[2][..., :8], scale=1.0)
    with fused_lm.use_backend("pytorch"):
        FORWARD(*half, scale=1.0)
    assert [called.args[9] for called in torch_own] == [True, False, False, False]


def test_the_forward_decides_whose_backward_runs(
    hook: sdpa._Overrides, torch_own: list[Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    execute = registration.execute

    def spy(op: str, *args: Any) -> Any:
        ran.append(f"{op} {args[-1]}")
        return execute(op, *args)

    monkeypatch.setattr(registration, "execute", spy)
    q, k, v = (t.requires_grad_() for t in _qkv(CASES[0]))
    with fused_lm.use_backend("triton" if "triton" in BACKENDS else "reference"):
        theirs, name = FORWARD(q, k, v, scale=1.0)[0], dispatch.current_backend()
    with fused_lm.use_backend("reference"):
        theirs.sum().backward()
    assert ran == [f"attention_fwd {name}", f"attention_bwd {name}"] and not torch_own
    own = FORWARD(q, k, v, scale=1.0)[0]
    with fused_lm.use_backend("reference"):
        own.sum().backward()
    assert len(ran) == 2 and [called.name for called in torch_own] == ["forward", "backward"]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.randn(2, 3, 5, 8),
    "rows first": lambda: torch.randn(2, 5, 3, 8).transpose(1, 2),
    "a part of a packed projection": lambda: torch.randn(2, 5, 3, 3, 8)[:, :, 1].transpose(1, 2),
    "sequence first": lambda: torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3),
    "one row, rows first": lambda: torch.randn(2, 1, 3, 8).transpose(1, 2),
    "one head, rows first": lambda: torch.randn(2, 5, 1, 8).transpose(1, 2),
    "expanded": lambda: torch.randn(2, 1, 5, 8).expand(2, 3, 5, 8),
    "last dims exchanged": lambda: torch.randn(2, 3, 8, 5).transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_those_that_torch_s_fake_promises(
    hook: sdpa._Overrides, backend: str, layout: str
) -> None:
    q, k, v = (_halved(LAYOUTS[layout]()) for _ in range(3))
    with fused_lm.use_backend(backend):
        real = FORWARD(q, k, v, 0.1)
        gradients = BACKWARD(real[0], q, k, v, *real[:6], 0.1, False, *real[6:8])
    fakes = [torch.empty_strided(t.shape, t.stride(), dtype=F16, device="meta") for t in (q, k, v)]
    fake = FORWARD(*fakes, 0.1)
    for mine, promised in zip(real, fake, strict=True):
        if isinstance(promised, Tensor):
            assert (mine.shape, mine.dtype) == (promised.shape, promised.dtype)
            assert _strides(mine) == _strides(promised)
        else:
            assert mine == promised
    assert real[7].storage_offset() == sdpa.MARKS[backend] != fake[7].storage_offset()
    for gradient, t in zip(gradients, (q, k, v), strict=True):
        like = torch.empty_like(t)
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)
        assert _strides(gradient) == _strides(like)


def _halved(t: Tensor) -> Tensor:
    """``t`` in fp16 with its strides, also those of stride 0 and between rows."""
    half = torch.empty(t.untyped_storage().nbytes() // 4, dtype=F16).normal_()
    return half.as_strided(t.shape, t.stride(), t.storage_offset())


def _strides(t: Tensor) -> list[int]:
    """Those that mean anything, and that a compiled graph looks at."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def test_compiled(hook: sdpa._Overrides, torch_own: list[Called]) -> None:
    """By Inductor, which asserts sizes, strides and, in torch 2.14, dtypes of what comes back."""
    leaves = [_halved(LAYOUTS["sequence first"]()).requires_grad_() for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FORWARD(q, k, v, 0.3, True)[0]

    def results(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    torch._dynamo.reset()
    with fused_lm.use_backend("reference"):
        eager, compiled = results(run), results(torch.compile(run, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert not torch_own


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(hook: sdpa._Overrides, backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(CASES[1]))
    with fused_lm.use_backend(backend):
        out = FORWARD(q, k, v, is_causal=True)[0]
        strided = torch.randn(16, 24, 4, 2).to(BF16).permute(3, 2, 1, 0)
        constant = torch.tensor(0.5, dtype=BF16).expand_as(out)
        for dout in (strided, constant):
            found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            dense = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_dispatch_sees_whether_a_call_trains(
    hook: sdpa._Overrides, torch_own: list[Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def choose(op: str, call: Any) -> str:
        seen.append(torch.is_grad_enabled() and call.q.requires_grad)
        return "pytorch"

    monkeypatch.setattr(dispatch, "choose", choose)
    q = torch.randn(1, 1, 4, 8, dtype=F16, requires_grad=True)
    FORWARD(q * 1, q, q, scale=1.0)
    with torch.no_grad():
        FORWARD(q, q, q, scale=1.0)
    FORWARD(q.detach(), q.detach(), q.detach(), scale=1.0)
    assert seen == [True, False, False]


def test_removed_leaves_nothing(hook: sdpa._Overrides) -> None:
    inputs = _qkv(CASES[0])
    with fused_lm.use_backend("reference"):
        FORWARD(*inputs)
    hook.remove()
    hook.remove()
    names = (f"aten::{op}" for op in (sdpa._FORWARD, sdpa._BACKWARD))
    assert not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in names)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        FORWARD(*inputs)


@pytest.mark.parametrize("case, dropout_p", ((CASES[0], 0.5), (CASES[3], 0.0)))
def test_a_late_backward_is_ours_where_torch_s_could_not_follow(
    hook: sdpa._Overrides, case: Case, dropout_p: float
) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(case))

    def out() -> Tensor:
        torch.manual_seed(1)
        with fused_lm.use_backend("reference"):
            return FORWARD(q, k, v, dropout_p, case.causal)[0]

    expected = torch.autograd.grad(out().sum(), (q, k, v))
    late = out()
    hook.remove()
    sdpa._Overrides("CPU").remove()
    found = torch.autograd.grad(late.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
