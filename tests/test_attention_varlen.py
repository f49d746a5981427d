"""``fused_lm.attention_varlen`` against its formula in fp64, on every backend that runs here, and
its CUDA kernel on the harness as the public function calls it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_lm
from fused_lm.explain import call_of
from fused_lm.ops import attention_varlen_checks as checks
from fused_lm.reference import attention_varlen as reference
from fused_lm.tolerance import check_close
from tests import gpu
from tests.attention_varlen_calls import BF16, F16, F32, I64, Call, bounds_of, data_of, formula
from tests.simt import backend as simt

F64 = torch.float64
BACKENDS = ("reference", "pytorch", "triton", *gpu.CUDA)
needs_harness = pytest.mark.skipif(not simt.ONE, reason=str(simt.PROBLEM))
CALLS = [
    Call("ragged", (37, 5, 1), (40, 5, 9), H=4, group=2),
    Call("empty ones", (0, 33, 4, 0), (7, 40, 0, 0), 128, integers=I64, upper=0),
    Call("causal from the end", (30, 4), (12, 9), 80, dtype=F16, upper=0, at_end=True),
    Call("wider v, window", (60, 7), (60, 7), 40, 72, lower=-9, upper=0, at_end=True),
    Call("narrower v, softcap", (60, 7), (64, 2), 256, 8, H=1, softcap=2.0),
    Call("fp32", (21, 8), (24, 3), 24, dtype=F32, upper=0),
    Call("fp64, a window to both sides", (21, 0), (24, 1), 16, dtype=F64, lower=-3, upper=2,
         at_end=True),
    Call("no sequence", (), (), 16),
    Call("one sequence", (9,), (9,), 16, upper=0, at_end=True),
]  # fmt: skip


def varlen(data: tuple[Any, ...], return_lse: bool = False) -> Any:
    """The public call of a table's arguments."""
    q, k, v, bounds_q, bounds_k, lower, upper, at_end, scale, softcap = data
    causal: bool | str = False
    if upper == 0:
        causal = "bottom_right" if at_end else "top_left"
    window = (None if lower is None else -lower, upper)
    return fused_lm.attention_varlen(
        *(q, k, v, bounds_q, bounds_k),
        causal=causal,
        window=None if lower is None else window,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
    )


def moved(data: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in data)


def runs(backend: str, call: Call) -> bool:
    if backend == "pytorch":
        return call.softcap == 0.0
    if backend == "triton":
        return call.dtype != F64
    return backend == "reference" or call.dtype in (F16, BF16)


@pytest.mark.parametrize(
    ("backend", "call"),
    [
        pytest.param(backend, call, id=f"{call.why}-{backend}")
        for call in CALLS
        for backend in BACKENDS
        if runs(backend, call)
    ],
)
def test_equals_the_formula(backend: str, call: Call, device: torch.device) -> None:
    data = data_of(call)
    same, exact = reference.attention_varlen_forward(*data), formula(*data)
    with fused_lm.use_backend(backend):
        got = varlen(moved(data, device), return_lse=backend != "pytorch")
    got = got if isinstance(got, tuple) else (got,)
    for result, yardstick, truth, name in zip(got, same, exact, ("out", "lse"), strict=False):
        if call.dtype == F64:
            torch.testing.assert_close(result.cpu(), truth)
        else:
            check_close(result.cpu(), yardstick, truth, name)


@needs_harness
@pytest.mark.parametrize("name", simt.ONE)
@pytest.mark.parametrize(
    "call", [c for c in CALLS if c.dtype in (F16, BF16) and c.T], ids=lambda call: call.why
)
def test_one_kernel_and_its_gradients(name: str, call: Call) -> None:
    """The public function where the kernel takes the call: out, lse, and the gradients of both."""
    q, k, v, *rest = data_of(call)
    dout, dlse = torch.randn(sum(call.T), call.H, call.values), torch.randn(call.H, sum(call.T))
    found, same, exact = {}, {}, {}
    for results, dtype in ((found, call.dtype), (same, call.dtype), (exact, F64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        if results is found:
            with simt.installed(name), fused_lm.use_backend(name):
                out, lse = varlen((*leaves, *rest), return_lse=True)
                gradients = _gradients(out, lse, leaves, dout, dlse)
        else:
            function = formula if results is exact else reference.attention_varlen_forward
            out, lse = function(*leaves, *rest)
            gradients = _gradients(out, lse, leaves, dout, dlse)
        results.update(zip(("out", "lse"), (out.detach(), lse.detach()), strict=True))
        results.update(zip(("dq", "dk", "dv"), gradients, strict=True))
    for part, result in found.items():
        check_close(result, same[part], exact[part], part)


def _gradients(
    out: Tensor, lse: Tensor, leaves: list[Tensor], dout: Tensor, dlse: Tensor
) -> tuple[Tensor, ...]:
    """Of a row without a key lse is a constant, whose gradient autograd would make NaN."""
    seen = lse.isfinite()
    total = (out.double() * dout).sum() + (lse.double()[seen] * dlse[seen]).sum()
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@needs_harness
def test_one_kernel_compiles_fullgraph() -> None:
    """Forward and, by the opaque operator behind it, backward; once for all lengths."""
    (name,) = simt.ONE

    def step(*data: Any) -> Any:
        out, lse = varlen(data, return_lse=True)
        return 2 * out, lse

    torch._dynamo.reset()
    counter, compilations = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    with simt.installed(name), fused_lm.use_backend(name):
        for lengths in (((37, 5), (40, 9)), ((3, 30, 11), (7, 20, 12))):
            q, k, v, *rest = data_of(Call("", *lengths, upper=0, at_end=True))
            results = []
            for function in (step, compiled):
                leaves = [t.clone().requires_grad_() for t in (q, k, v)]
                out, lse = function(*leaves, *rest)
                loss = out.float().square().sum() + lse[lse.isfinite()].sum()
                results.append((out, lse, *torch.autograd.grad(loss, leaves)))
            for eager, other in zip(*results, strict=True):
                assert torch.equal(eager, other)
            compilations.add(counter.frame_count)
    assert len(compilations) == 1, "other lengths ran what the first one had compiled"


def test_auto_is_pytorch_on_a_cpu() -> None:
    q, bounds = torch.randn(5, 4, 16), bounds_of((2, 3))
    call = (q, q, q, bounds, bounds)
    assert fused_lm.why("attention_varlen", *call).backend == "pytorch"
    assert fused_lm.why("attention_varlen", *call, softcap=1.0).backend == "reference"
    assert fused_lm.why("attention_varlen", *call, return_lse=True).backend == "reference"


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_gradients_are_those_of_the_formula(backend: str, device: torch.device) -> None:
    dtype = F32 if backend == "triton" else F64
    data = moved(data_of(Call("", (5, 0, 9), (7, 3, 9), 16, dtype=dtype, H=4, group=2)), device)
    leaves = [t.requires_grad_() for t in data[:3]]
    with fused_lm.use_backend(backend):
        out = varlen((*leaves, *data[3:]))
    got = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(formula(*leaves, *data[3:])[0].square().sum(), leaves)
    for mine, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_opcheck(backend: str, device: torch.device) -> None:
    """Forward and backward, of the schema that the kernel implements."""
    call = Call("", (5, 0, 9), (7, 3, 9), 16, dtype=F32, H=4, group=2, upper=0, at_end=True)
    q, k, v, *rest = moved(data_of(call), device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    operators = torch.ops.fused_lm
    torch.library.opcheck(operators.attention_varlen_fwd.default, (*leaves, *rest, backend))
    with torch.no_grad():
        out, lse = operators.attention_varlen_fwd(*leaves, *rest, backend)
        arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *rest)
        inputs = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(operators.attention_varlen_bwd.default, (*inputs, backend))


def test_second_derivatives() -> None:
    """Of the operator, whose backward is differentiated through the reference."""
    q, k, v, *rest = data_of(Call("", (2, 1), (2, 1), 2, dtype=F64, H=1, upper=1))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def out_of(*leaves: Tensor) -> Any:
        return torch.ops.fused_lm.attention_varlen_fwd(*leaves, *rest, "reference")

    assert torch.autograd.gradcheck(out_of, leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: out_of(*leaves)[0], leaves)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_fullgraph(backend: str, device: torch.device) -> None:
    data = moved(data_of(Call("", (5, 9), (7, 9), 16, dtype=F32, upper=0)), device)
    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        compiled = torch.compile(varlen, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(data), varlen(data))


def test_autocast_narrows_what_is_mixed() -> None:
    q, bounds = torch.randn(5, 4, 16), bounds_of((2, 3))
    with torch.autocast("cpu", dtype=BF16), fused_lm.use_backend("reference"):
        got = fused_lm.attention_varlen(q, q.bfloat16(), q.bfloat16(), bounds, bounds)
    narrow = q.bfloat16()
    arguments = (narrow, narrow, narrow, bounds, bounds, None, None, False, 0.25, 0.0)
    assert got.dtype == BF16
    assert torch.equal(got, reference.attention_varlen_forward(*arguments)[0])


_BOUNDS = {"cu_seqlens_q": torch.tensor([0, 3, 5]), "cu_seqlens_k": torch.tensor([0, 2, 7])}
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(1, 5, 4, 16)}, ValueError, r"takes \[N, H, D\] tensors"),
    ({"q": torch.zeros(5, 3, 16)}, ValueError, "must divide the heads of q"),
    ({"q": torch.zeros(5, 4, 8)}, ValueError, "q and k must share D"),
    ({"v": torch.zeros(6, 2, 16)}, ValueError, "v must have the rows and heads of k"),
    ({"v": torch.zeros(7, 2, 16).half()}, TypeError, "of one dtype"),
    ({"v": torch.zeros(7, 2, 16, device="meta")}, TypeError, "on one device"),
    ({"cu_seqlens_q": torch.zeros(3)}, ValueError, r"must be int \[sequences \+ 1\]"),
    ({"cu_seqlens_k": torch.zeros(0).int()}, ValueError, r"must be int \[sequences \+ 1\]"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, "names 1 sequences, cu_seqlens_k 2"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, "must rise from 0 to 5"),
    ({"cu_seqlens_q": torch.tensor([1, 3, 5])}, ValueError, "must rise from 0 to 5"),
    ({"cu_seqlens_k": torch.tensor([0, 8, 7])}, ValueError, "must rise from 0 to 7"),
    (dict.fromkeys(_BOUNDS, torch.tensor([0])), ValueError, "rows of no sequence"),
    ({"causal": True}, ValueError, "causal=True is ambiguous"),
    ({"causal": "left"}, ValueError, "causal must be"),
    ({"window": (-1, 0)}, ValueError, "window must be"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite"),
]


@pytest.mark.parametrize(("changed", "error", "text"), ERRORS, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"q": torch.randn(5, 4, 16), **_BOUNDS}
    arguments["k"] = arguments["v"] = torch.randn(7, 2, 16)
    with pytest.raises(error, match=text) as caught:
        fused_lm.attention_varlen(**{**arguments, **changed})
    assert "\n" not in str(caught.value)


def test_causal_true_is_for_equal_lengths() -> None:
    """Of each sequence, where somebody reads them: as many rows in all are not enough."""
    q = torch.randn(5, 2, 16)
    with pytest.raises(ValueError, match="causal=True is ambiguous"):
        fused_lm.attention_varlen(q, q, q, bounds_of((2, 3)), bounds_of((3, 2)), causal=True)
    same = fused_lm.attention_varlen(q, q, q, *[bounds_of((2, 3))] * 2, causal=True)
    other = fused_lm.attention_varlen(q, q, q, *[bounds_of((2, 3))] * 2, causal="top_left")
    assert torch.equal(same, other)


def _call(*tensors: Tensor, **options: Any) -> checks.AttentionVarlenCall:
    found: checks.AttentionVarlenCall = call_of("attention_varlen", *tensors, **options)
    return found


def test_what_cuda_refuses() -> None:
    q, bounds = torch.zeros(5, 4, 16).half(), bounds_of((2, 3))
    assert checks.cuda_limit(_call(q, q, q, bounds, bounds)) is None
    wide = torch.zeros(5, 4, 264).half()
    for limit, call in (
        ("float16 and bfloat16", _call(*[q.float()] * 3, bounds, bounds)),
        ("multiples of 8 up to 256", _call(q, q, q[..., :9], bounds, bounds)),
        ("multiples of 8 up to 256", _call(wide, wide, wide, bounds, bounds)),
    ):
        assert limit in str(checks.cuda_limit(call))


def test_what_is_no_single_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then each sequence is a call of its own, as on an A100, with the checks that it brings."""
    q, bounds = torch.zeros(5, 4, 16).half(), bounds_of((2, 3))
    assert checks.one_kernel_refuses(_call(q, q, q, bounds, bounds)) is None
    assert "int32 or int64" in str(
        checks.one_kernel_refuses(_call(q, q, q, bounds.short(), bounds))
    )
    with torch.device("meta"):
        away = torch.empty(5, 4, 16).half()
    call = _call(away, away, away, bounds, bounds)
    assert "where q is" in str(checks.one_kernel_refuses(call))
    for capability, target in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        checks.extension._target_of.cache_clear()
        monkeypatch.setattr(
            checks.extension, "target_for", lambda c: "sm_90" if c == (9, 0) else "sm_80"
        )
        assert checks.extension._runs_sm90(0) == target
    checks.extension._target_of.cache_clear()


def test_shape_classes() -> None:
    def family(D: int, lengths: tuple[int, ...], **options: Any) -> tuple[str, int]:
        q, bounds = torch.zeros(sum(lengths), 1, D), bounds_of(lengths)
        return checks._shape_class(_call(q, q, q, bounds, bounds, **options))

    assert family(64, (128, 128)) == ("d64-plain", 0)
    assert family(72, (129, 128), causal=True) == ("d96-band", 1)
    assert family(128, (600, 600), softcap=1.0, window=(3, 0)) == ("d128-band-softcap", 2)
