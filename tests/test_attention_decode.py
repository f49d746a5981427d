"""``fused_lm.attention_decode`` against its formula in fp64, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_lm
from fused_lm.explain import call_of
from fused_lm.ops.attention_decode_checks import cuda_limit
from fused_lm.reference import attention_decode as reference
from fused_lm.tolerance import check_close
from tests import gpu
from tests.attention_calls import Layout
from tests.attention_decode_calls import BF16, F16, F32, I64, Call, data_of, formula

F64 = torch.float64
BACKENDS = ("reference", "pytorch", "triton", *gpu.CUDA)
CALLS = [
    Call("one token each, ragged", (37, 5, 1), 40, D=64, H=4, group=2),
    Call("a sequence without a key, lengths in int64", (0, 33), 40, D=128, T=2, integers=I64),
    Call("nine tokens, eight heads of one", (30, 4), 32, D=80, T=9, H=8, group=8, dtype=F16),
    Call("wider v, window", (60, 7), 64, D=40, Dv=72, T=3, lower=-9),
    Call("narrower v, softcap", (60, 7), 64, D=256, Dv=8, H=1, softcap=2.0),
    Call("shuffled pages", (90, 17), 96, D=64, page=16, T=2, H=4, group=2),
    Call("odd pages, int64", (23, 9), 24, D=64, page=5, T=5, integers=I64, lower=-6, upper=1),
    Call("not causal, fp32", (21, 8), 24, D=24, T=3, upper=None, dtype=F32),
    Call("pages, fp32", (21, 8), 24, D=24, T=3, page=4, dtype=F32, H=6, group=3),
    Call("pages, fp64", (21, 0), 24, D=16, T=2, page=8, dtype=F64),
    Call("heads side by side", (21, 30), 32, D=64, T=2, H=4, group=2, layout=Layout.PACKED),
    Call("no query", (3,), 8, D=16, T=0),
    Call("no key", (0, 2), 0, D=16),
]


def decode(data: tuple[Any, ...], return_lse: bool = False) -> Any:
    """The public call of a table's arguments."""
    q, k_cache, v_cache, lens, table, lower, upper, scale, softcap = data
    window = (None if lower is None else -lower, upper)
    return fused_lm.attention_decode(
        *(q, k_cache, v_cache, lens, table),
        causal=upper == 0,
        window=window,
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
    same, exact = reference.attention_decode_forward(*data), formula(*data)
    with fused_lm.use_backend(backend):
        got = decode(moved(data, device), return_lse=backend != "pytorch")
    got = got if isinstance(got, tuple) else (got,)
    for result, yardstick, truth, name in zip(got, same, exact, ("out", "lse"), strict=False):
        if call.dtype == F64:
            torch.testing.assert_close(result.cpu(), truth)
        else:
            check_close(result.cpu(), yardstick, truth, name)


def _inputs(B: int = 2, T: int = 1, S: int = 12, D: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, T, D), torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)


def test_auto_is_pytorch_on_a_cpu() -> None:
    q, k, v = _inputs()
    lens = torch.tensor([3, 12])
    assert fused_lm.why("attention_decode", q, k, v, lens).backend == "pytorch"
    assert fused_lm.why("attention_decode", q, k, v, lens, softcap=1.0).backend == "reference"
    assert fused_lm.why("attention_decode", q, k, v, lens, return_lse=True).backend == "reference"


def test_the_cache_of_a_prefix_is_the_attention_to_it() -> None:
    """Token by token what :func:`fused_lm.attention` gives at once."""
    q, k, v = torch.randn(1, 4, 12, 16), *_inputs(1)[1:]
    whole = fused_lm.attention(q, k, v, causal=True)
    for n in (1, 5, 12):
        lens = torch.tensor([n])
        one = fused_lm.attention_decode(q[:, :, n - 1 : n], k, v, lens)
        torch.testing.assert_close(one, whole[:, :, n - 1 : n])
    last = fused_lm.attention_decode(q[:, :, 4:9], k, v, torch.tensor([9]))
    torch.testing.assert_close(last, whole[:, :, 4:9])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_formula(backend: str) -> None:
    """With NaN behind a sequence's end, whose keys have a gradient of 0."""
    call = Call("", (5, 9), 12, D=16, T=2, H=4, group=2, dtype=F64)
    q, k, v, *rest = data_of(call)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with fused_lm.use_backend(backend):
        out = decode((*leaves, *rest))
    got = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(formula(*leaves, *rest)[0].square().sum(), leaves)
    for mine, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, truth)


def test_autocast_narrows_what_is_mixed() -> None:
    q, k, v = _inputs()
    lens = torch.tensor([3, 12])
    with torch.autocast("cpu", dtype=BF16), fused_lm.use_backend("reference"):
        got = fused_lm.attention_decode(q, k.bfloat16(), v.bfloat16(), lens)
    narrow = (t.bfloat16() for t in (q, k, v))
    expected, _ = reference.attention_decode_forward(*narrow, lens, None, None, 0, 0.25, 0.0)
    assert got.dtype == BF16 and torch.equal(got, expected)


def test_opcheck() -> None:
    data = data_of(Call("", (5, 9), 12, D=16, T=2, H=4, group=2, dtype=F32, page=4))
    torch.library.opcheck(torch.ops.fused_lm.attention_decode_fwd.default, (*data, "reference"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("paged", [False, True])
def test_compiles_fullgraph(backend: str, paged: bool) -> None:
    data = data_of(Call("", (5, 9), 12, D=16, T=2, dtype=F32, page=4 if paged else 0))
    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(data), decode(data), rtol=0, atol=0)


def test_compiles_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for B, S in ((3, 12), (5, 40), (7, 33)):
        data = data_of(Call("", tuple(range(1, B + 1)), S, D=16, dtype=F32))
        torch.testing.assert_close(compiled(data), decode(data))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "other lengths ran what the first one had compiled"


def _table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(4, 1, 16)}, ValueError, "takes tensors of four dims"),
    ({"q": torch.zeros(2, 3, 1, 16)}, ValueError, "must divide the heads of q"),
    ({"q": torch.zeros(2, 4, 1, 8)}, ValueError, "q and k_cache must share D"),
    ({"v_cache": torch.zeros(2, 2, 11, 16)}, ValueError, "all dims of k_cache but the last"),
    ({"v_cache": torch.zeros(2, 2, 12, 16).half()}, TypeError, "of one dtype"),
    ({"q": torch.zeros(3, 4, 1, 16), "cache_lens": torch.ones(3).int()}, ValueError, "q's batch"),
    ({"cache_lens": torch.ones(3).int()}, ValueError, "cache_lens must be int32 or int64"),
    ({"cache_lens": torch.ones(2)}, TypeError, "cache_lens must be int32 or int64"),
    ({"cache_lens": torch.ones(2, device="meta").int()}, TypeError, "on one device"),
    ({"block_table": torch.zeros(2, 1)}, TypeError, "block_table must be int32 or int64"),
    ({"block_table": _table([0, 1])}, ValueError, "block_table must be \\[B, blocks\\]"),
    ({"block_table": _table([0], [2])}, ValueError, "must name blocks 0 .. 1"),
    ({"block_table": _table([-1], [0])}, ValueError, "must name blocks 0 .. 1"),
    ({"window": (1, 2)}, ValueError, "right must be 0"),
    ({"window": (-1, 0)}, ValueError, "window must be"),
    ({"causal": "top_left"}, ValueError, "causal must be True"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite"),
]


@pytest.mark.parametrize(("changed", "error", "text"), ERRORS, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v = _inputs()
    arguments: dict[str, Any] = {"q": q, "k_cache": k, "v_cache": v}
    arguments["cache_lens"] = torch.tensor([3, 12])
    with pytest.raises(error, match=text) as caught:
        fused_lm.attention_decode(**{**arguments, **changed})
    assert "\n" not in str(caught.value)


def test_what_cuda_refuses() -> None:
    def limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return cuda_limit(call_of("attention_decode", q, k, v, torch.tensor([3, 12])))

    q, k, v = (t.half() for t in _inputs())
    assert limit(q, k, v) is None
    assert "float16 and bfloat16" in str(limit(q.float(), k.float(), v.float()))
    assert "multiples of 8 up to 256" in str(limit(q, k, v[..., :9]))
    wide = [torch.zeros(2, 4, 3, 264).half()] * 2
    assert "multiples of 8 up to 256" in str(limit(*wide, wide[0]))
