"""``fused_lm.layer_norm`` and ``rms_norm`` against the formula in fp64, on every backend that runs
here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm.reference.philox import scaled_keep
from fused_lm.tolerance import check_close
from tests import oracle
from tests.gpu import CUDA

BACKENDS = ("reference", "pytorch", "triton", *CUDA)
KERNELS = ("reference", "triton", *CUDA)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (5, 64)
    dtype: torch.dtype = F32
    weight: bool = True
    bias: bool = True
    residual: bool = False
    dropout_p: float = 0.0
    offset: float = 0.0
    eps: float = 1e-5


CASES = [
    Case("plain"),
    Case("width 1", (3, 1)),
    Case("width 2", (3, 2)),
    Case("width 7, many rows", (33, 7)),
    Case("width 100, bf16", (4, 100), BF16),
    Case("width 257, fp16", (4, 257), F16),
    Case("width 769", (3, 769)),
    Case("one row", (1, 64)),
    Case("three dims", (2, 3, 64)),
    Case("one dim", (64,)),
    Case("no bias", bias=False),
    Case("no weight, no bias", weight=False, bias=False),
    Case("mean of 1000: E[x^2] - E[x]^2 would cancel", offset=1000.0),
    Case("residual", residual=True),
    Case("residual, bf16", dtype=BF16, residual=True),
    Case("dropout", dropout_p=0.3),
    Case("dropout and residual", residual=True, dropout_p=0.2),
    Case("dropout and residual, bf16, ragged", (37, 100), BF16, residual=True, dropout_p=0.2),
    Case("dropout of everything", residual=True, dropout_p=1.0),
    Case("large eps", eps=0.5),
]


def _run(rms: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
    if rms:
        return fused_lm.rms_norm(x, weight, **options)
    return fused_lm.layer_norm(x, weight, bias, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_equals_fp64(case: Case, rms: bool, backend: str, device: torch.device) -> None:
    if backend == "pytorch" and (case.offset or case.shape[-1] <= 2):
        pytest.skip("torch 2.13's own CPU LayerNorm cancels here: E[x^2] - E[x]^2")
    C = case.shape[-1]
    rng = keep = None
    if case.dropout_p > 0:
        if backend == "pytorch":
            pytest.skip("PyTorch's dropout draws its own mask")
        rng = torch.tensor([123456789, 3, 0, 0], device=device)
        rows = torch.Size(case.shape[:-1]).numel()
        keep = scaled_keep(rng, 1, 1, rows, C, case.dropout_p, F64).view(case.shape)
    tensors = {"x": torch.randn(case.shape, device=device) + case.offset}
    if case.residual:
        tensors["residual"] = torch.randn(case.shape, device=device)
    if case.weight:
        tensors["weight"] = torch.randn(C, device=device)
    if case.bias and not rms:
        tensors["bias"] = torch.randn(C, device=device)
    names = list(tensors)

    def named(values: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
        given = dict(zip(names, values, strict=True))
        return {name: given.get(name) for name in ("x", "weight", "bias", "residual")}

    def ours(*values: Tensor) -> tuple[Tensor, ...]:
        given = named(values)
        with fused_lm.use_backend(backend):
            return _run(
                rms, given["x"], given["weight"], given["bias"], residual=given["residual"],
                eps=case.eps, dropout_p=case.dropout_p, rng=rng, return_residual=True,
            )  # fmt: skip

    def formula(*values: Tensor) -> tuple[Tensor, ...]:
        return oracle.layer_norm(**named(values), eps=case.eps, keep=keep, rms=rms)

    inputs = [t.to(case.dtype) for t in tensors.values()]
    oracle.check_against_oracle(ours, formula, inputs, ["y", "stream", *(f"d{n}" for n in names)])


MIXES = [
    ("fp32 stream under autocast", BF16, F32, F32, BF16, F32),
    ("bf16 everything, fp32 parameters", BF16, BF16, F32, BF16, BF16),
    ("fp16 in, fp32 out", F16, None, F16, F32, F16),
    ("fp32 in, bf16 out, bf16 parameters", F32, F32, BF16, BF16, F32),
    ("bf16 stream from fp32 parts", F32, F32, F32, F32, BF16),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    "why, x, residual, parameters, out, stream", MIXES, ids=[m[0] for m in MIXES]
)
def test_dtypes_are_independent(
    why: str, x: Any, residual: Any, parameters: Any, out: Any, stream: Any, rms: bool,
    backend: str, device: torch.device,
) -> None:  # fmt: skip
    dtypes = [x, residual, parameters, None if rms else parameters]
    shapes = [(6, 48), (6, 48), (48,), (48,)]
    inputs = [
        None if d is None else torch.randn(s, device=device).to(d)
        for d, s in zip(dtypes, shapes, strict=True)
    ]

    def ours(*given: Tensor | None) -> tuple[Tensor, ...]:
        x, residual, weight, bias = given
        with fused_lm.use_backend(backend):
            return _run(
                rms, x, weight, bias, eps=1e-5, residual=residual, return_residual=True,
                out_dtype=out, residual_dtype=stream,
            )  # fmt: skip

    def formula(*given: Tensor | None) -> tuple[Tensor, ...]:
        x, residual, weight, bias = given
        return oracle.layer_norm(x, weight, bias, 1e-5, residual=residual, rms=rms)

    def rounded(*given: Tensor | None) -> tuple[Tensor, ...]:
        """The formula in plain operators: all after the stream carries the stream's rounding."""
        x, residual, *parameters = given
        total = (x if residual is None else x + residual).to(stream)
        wide = [None if t is None else t.float() for t in (total, None, *parameters)]
        return formula(*wide)[0].to(out), total

    def run(function: Any, given: list[Tensor | None]) -> list[Tensor]:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
        results = function(*leaves)
        total = sum((t.double() * torch.arange(48, device=device) / 64).sum() for t in results)
        present = [t for t in leaves if t is not None]
        return [*results, *torch.autograd.grad(total, present)]

    got, same = run(ours, inputs), run(rounded, inputs)
    exact = run(formula, [None if t is None else t.double() for t in inputs])
    assert [t.dtype for t in got] == [out, stream, *(t.dtype for t in inputs if t is not None)]
    for mine, near, truth in zip(got, same, exact, strict=True):
        check_close(mine, near, truth)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_unusual_gradients(rms: bool, backend: str, device: torch.device) -> None:
    """Only the stream used; only y used; a stride-0 and a transposed incoming gradient."""
    x, residual = (torch.randn(6, 20, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, device=device, requires_grad=True)
    with fused_lm.use_backend(backend):
        y, stream = _run(rms, x, weight, None, residual=residual, return_residual=True)
    only_stream = torch.autograd.grad(stream.sum(), (x, residual), retain_graph=True)
    assert all(torch.equal(g, torch.ones_like(g)) for g in only_stream)
    ones = torch.ones(1, device=device).expand_as(y)
    expanded = torch.autograd.grad(y, (x, weight), ones, retain_graph=True)
    dense = torch.autograd.grad(y, (x, weight), ones.contiguous(), retain_graph=True)
    torch.testing.assert_close(expanded, dense)
    dy = torch.randn(20, 6, device=device).t()
    transposed = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    dense = torch.autograd.grad(y, (x, weight), dy.contiguous())
    torch.testing.assert_close(transposed, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalises(backend: str, device: torch.device) -> None:
    x = torch.randn(9, 200, device=device) * 7 + 3
    with fused_lm.use_backend(backend):
        y = fused_lm.layer_norm(x)
        z = fused_lm.rms_norm(x)
        strided = fused_lm.layer_norm(torch.stack([x, x + 1], -1)[..., 0])
        nothing = fused_lm.layer_norm(x[:0])
    assert y.mean(-1).abs().max() < 1e-5 and (y.var(-1, correction=0) - 1).abs().max() < 1e-4
    assert (z.square().mean(-1) - 1).abs().max() < 1e-4
    torch.testing.assert_close(y, strided)
    assert nothing.shape == (0, 200)


@pytest.mark.parametrize("backend", KERNELS)
def test_constant_rows(backend: str, device: torch.device) -> None:
    """Their variance is 0, however large they are: what rounding makes of it must not be below."""
    largest = torch.finfo(F32).max ** 0.25
    values = torch.cat([torch.logspace(0, math.log10(largest), 40), torch.tensor([39814896.0])])
    bias = torch.randn(1000, device=device)
    rows = values.to(device)[:, None].expand(-1, 1000)
    with fused_lm.use_backend(backend):
        y = fused_lm.layer_norm(rows, None, bias)
        undefined = fused_lm.layer_norm(torch.full((1, 1000), math.nan, device=device))
    assert torch.isfinite(y).all() and undefined.isnan().all()
    # Some roundings of the mean, over sqrt(eps); all rows' standard deviations keep it below 1.
    slack = 8.0 * torch.finfo(F32).eps * values.to(device)[:, None] / 1e-5**0.5
    assert ((y - bias).abs() <= slack.clamp(1e-6, 1.0 + 1e-6)).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_second_derivatives(rms: bool, backend: str, device: torch.device) -> None:
    inputs = [torch.randn(s, device=device) for s in ((3, 6), (3, 6), (6,))]
    direction = torch.randn(3, 6, device=device, dtype=F64)

    def curvature(run: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, stream = run(*tensors)
        first = torch.autograd.grad(
            (y * y * y).sum() + stream.sin().sum(), tensors, create_graph=True
        )
        total = sum((g * direction.to(g.dtype)).sum() for g in first[:2]) + first[2].square().sum()
        return torch.autograd.grad(total, tensors)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        with fused_lm.use_backend(backend):
            return _run(rms, x, weight, None, eps=1e-2, residual=residual, return_residual=True)

    def formula(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return oracle.layer_norm(x, weight, None, 1e-2, residual=residual, rms=rms)

    got = curvature(ours, *(t.clone().requires_grad_() for t in inputs))
    exact = curvature(formula, *(t.double().requires_grad_() for t in inputs))
    for ours_, truth in zip(got, exact, strict=True):
        assert (ours_ - truth).abs().max() <= 1e3 * torch.finfo(F32).eps * truth.abs().max()


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_compile_and_transforms(rms: bool, backend: str, device: torch.device) -> None:
    x, residual = (torch.randn(4, 3, 16, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, device=device, requires_grad=True)

    def step(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, stream = _run(rms, x, weight, None, residual=residual, return_residual=True)
        return (y.sin() * stream).sum()

    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        eager = step(x, residual, weight)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, residual, weight)
        gradients = [torch.autograd.grad(t, (x, residual, weight)) for t in (eager, compiled)]
        transformed = torch.func.grad(step)(x.detach(), residual.detach(), weight.detach())
        batched = torch.func.vmap(lambda a: _run(rms, a, None, None))(x.detach())
        whole = _run(rms, x.detach(), None, None)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(transformed, gradients[0][0])
    torch.testing.assert_close(batched, whole)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(fused: bool, backend: str, device: torch.device) -> None:
    x, residual = (torch.randn(5, 12, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(12, device=device, requires_grad=True) for _ in range(2))
    rng = torch.tensor([1, 2, 0, 0], device=device)
    residual, rng, p = (residual, rng, 0.2) if fused else (None, None, 0.0)
    tail = (rng, 1e-5, p, F32, F32, backend)
    ops = torch.ops.fused_lm
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, residual, weight, bias, *tail))
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, residual, weight, *tail))
    dstream = torch.randn(5, 12, device=device) if fused else None
    dtype = F32 if fused else None
    with torch.no_grad():
        _, _, mean, rstd = ops.layer_norm_fwd(x, residual, weight, bias, *tail)
    saved = (torch.randn(5, 12, device=device), dstream, x.detach(), weight.detach())
    end = (rng, p, F32, dtype, backend)
    torch.library.opcheck(ops.layer_norm_bwd.default, (*saved, bias.detach(), mean, rstd, *end))
    torch.library.opcheck(ops.rms_norm_bwd.default, (*saved, rstd, *end))


x = torch.zeros(3, 8)
BAD_CALLS = [
    ((torch.tensor(1.0),), {}, ValueError, "x [..., C] with C >= 1, got x []"),
    ((x[:, :0],), {}, ValueError, "C >= 1"),
    ((x.int(),), {}, TypeError, "float tensors, got x torch.int32"),
    ((x, torch.zeros(7)), {}, ValueError, "weight must be [C], got x [3, 8], weight [7]"),
    ((x, torch.zeros(8, dtype=torch.int64)), {}, TypeError, "got weight torch.int64"),
    ((x, torch.zeros(8, device="meta")), {}, TypeError, "one device, got x on cpu, weight on meta"),
    ((x,), {"residual": x[:1]}, ValueError, "residual must have the shape of x"),
    ((x,), {"dropout_p": -0.1}, ValueError, "between 0 and 1, got -0.1"),
    ((x,), {"out_dtype": torch.int32}, TypeError, "outputs are float"),
]


@pytest.mark.parametrize("args, options, error, text", BAD_CALLS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_bad_calls(rms: bool, args: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        (fused_lm.rms_norm if rms else fused_lm.layer_norm)(*args, **options)
    assert text in str(caught.value)
