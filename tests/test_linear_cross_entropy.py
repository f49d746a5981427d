"""``fused_lm.linear_cross_entropy`` against whole logits in fp64, on every backend that runs
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_lm
from fused_lm.parity.cross_entropy_cases import formula
from fused_lm.tolerance import check_close
from tests import oracle
from tests.gpu import CUDA, harness_later

BACKENDS = ("reference", "pytorch", "triton", *CUDA)
KERNELS = ("reference", "triton", *CUDA)
SLOW_KERNELS = harness_later(KERNELS)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


@dataclass(frozen=True)
class Case:
    """One call; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (24,)
    C: int = 16
    V: int = 37
    dtype: torch.dtype = F32
    bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = KERNELS


CASES = [
    Case("one chunk", backends=BACKENDS),
    Case("one chunk, bf16, bias", dtype=BF16, bias=True, backends=BACKENDS),
    Case("as many rows as a chunk", options={"chunk_rows": 24}, backends=BACKENDS),
    Case("chunks", options={"chunk_rows": 8}),
    Case("a short last chunk, bias", bias=True, options={"chunk_rows": 7}),
    Case("a row at a time, bf16", (90,), 8, 5, BF16, True, {"chunk_rows": 1}),
    Case("chunks, fp16, bias", dtype=F16, bias=True, options={"chunk_rows": 5}),
    Case("chunks, fp64", dtype=F64, bias=True, options={"chunk_rows": 5}, backends=KERNELS[:1]),
    Case("products of the tensor cores", (24,), 16, 40, BF16, options={"chunk_rows": 7}),
    Case("the same, fp16, bias", (2, 9), 8, 24, F16, True, {"chunk_rows": 5}),
    Case("the same, none", (20,), 24, 16, BF16, True, {"chunk_rows": 8, "reduction": "none"}),
    Case("none, chunks", bias=True, options={"chunk_rows": 9, "reduction": "none"}),
    Case("none, three dims, fp16", (2, 5), 8, 9, F16, options={"reduction": "none"}),
    Case("sum, three dims", (2, 5), options={"chunk_rows": 3, "reduction": "sum"}),
    Case("all options, bf16", dtype=BF16, bias=True, options={**ALL_OPTIONS, "chunk_rows": 10}),
    Case("all options, none", options={**ALL_OPTIONS, "chunk_rows": 10, "reduction": "none"}),
    Case("one class", V=1),
    Case("width 1, one row", (1,), 1, 3),
    # In fp32 luck decides: a product of torch's errs by more than any kernel, in another order of
    # its 16411 terms by twice as much. CUDA's kernel has no such limit to be asked about.
    Case(
        *("a vocabulary wider than a program's registers", (3,), 2, 16411, BF16),
        options={"chunk_rows": 2},
        backends=("reference", "triton"),
    ),
    Case("a class as ignore_index", options={"ignore_index": 3, "chunk_rows": 4}),
]


def _inputs(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    inputs = [torch.randn(*case.shape, case.C, device=device)]
    inputs.append(torch.randn(case.V, case.C, device=device))
    if case.bias:
        inputs.append(torch.randn(case.V, device=device))
    target = torch.randint(case.V, case.shape, device=device)
    if target.shape[0] > 2:
        target[1] = case.options.get("ignore_index", -100)
    return [t.to(case.dtype) for t in inputs], target


def _call(tensors: tuple[Tensor, ...], target: Tensor, **options: Any) -> Tensor:
    x, weight, *bias = tensors
    return fused_lm.linear_cross_entropy(
        x, weight, target, bias=bias[0] if bias else None, **options
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    if backend not in case.backends:
        pytest.skip("the backend refuses this call")
    inputs, target = _inputs(case, device)

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return (_call(tensors, target, **case.options),)

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        options = {name: v for name, v in case.options.items() if name != "chunk_rows"}
        return (formula(F.linear(*tensors), target, **options),)

    names = ["loss", "dx", "dweight", "dbias"][: len(inputs) + 1]
    oracle.check_against_oracle(ours, exact, inputs, names)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(*inputs), ours(*(t.clone().requires_grad_() for t in inputs))
        )


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("V", "dtype"), [(37, F32), (40, BF16)], ids=["fp32", "bf16"])
def test_some_gradients(
    V: int,
    dtype: torch.dtype,
    reduction: str,
    wanted: tuple[int, ...],
    backend: str,
    device: torch.device,
) -> None:
    """A frozen output layer, or a frozen model: the others' gradients are the same bits."""
    inputs, target = _inputs(Case("", (24,), 16, V, dtype, True), device)
    options = {"chunk_rows": 10, "reduction": reduction}

    def gradients(places: tuple[int, ...]) -> dict[int, Tensor]:
        leaves = [t.clone().requires_grad_(i in places) for i, t in enumerate(inputs)]
        with fused_lm.use_backend(backend):
            loss = _call(tuple(leaves), target, **options).sum()
        found = torch.autograd.grad(loss, [leaves[i] for i in places])
        return dict(zip(places, found, strict=True))

    every = gradients((0, 1, 2))
    for i, gradient in gradients(wanted).items():
        assert torch.equal(gradient, every[i])


@pytest.mark.parametrize("backend", SLOW_KERNELS)
def test_mixed_dtypes_and_autocast(backend: str, device: torch.device) -> None:
    """Master weights keep the fp32 sum of their gradient; products run in the dtype of x."""
    inputs, target = _inputs(Case("", (60,), bias=True), device)

    def run(x: Tensor, **autocast: Any) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(), *(t.clone().requires_grad_() for t in inputs[1:])]
        with fused_lm.use_backend(backend), torch.autocast(device.type, **autocast):
            loss = _call(tuple(leaves), target, chunk_rows=7)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    mixed = run(inputs[0].bfloat16(), enabled=False)
    under = run(inputs[0], dtype=BF16)
    assert [t.dtype for t in mixed] == [F32, BF16, F32, F32]
    assert [t.dtype for t in under] == [F32] * 4
    for a, b in zip(mixed, under, strict=True):
        assert torch.equal(a.float(), b)
    rounded = [t.bfloat16() for t in inputs]
    results = []
    for dtype in (BF16, F64):
        leaves = [t.to(dtype).requires_grad_() for t in rounded]
        loss = formula(F.linear(*leaves), target)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, same, truth in zip(mixed, *results, strict=True):
        check_close(ours, same.to(ours.dtype), truth)


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_loss_scale_is_a_factor(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Gradients of a mean are made before the loss scale is known, and don't vanish in fp16: those
    of these small weights would be about three of its smallest numbers.
    """
    inputs, target = _inputs(Case("", (600,), 4, 11, dtype), device)
    inputs[1] = inputs[1] * 1e-4
    scale = 2.0**12
    leaves = [t.clone().requires_grad_() for t in inputs]
    with fused_lm.use_backend(backend):
        loss = _call(tuple(leaves), target, chunk_rows=150) * scale
    found = torch.autograd.grad(loss, leaves)
    leaves = [t.double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(formula(F.linear(*leaves), target) * scale, leaves)
    for ours, truth in zip(found, exact, strict=True):
        error = (ours.double() - truth).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize(("V", "N", "sums"), [(2, 1200, (-600, 600)), (8, 1024, (-896, 128))])
def test_the_weights_gradient_adds_up_in_fp32(
    V: int, N: int, sums: tuple[int, int], backend: str, device: torch.device
) -> None:
    """Chunks of 6 rows, each -3 or 3 (V = 8: -5.25, 0.75) and exact: a bf16 sum would round from
    512 on.
    """
    x = torch.ones(N, 8, device=device, dtype=BF16)
    leaves = [torch.zeros(shape, device=device, dtype=BF16) for shape in ((V, 8), (V,))]
    leaves = [t.requires_grad_() for t in leaves]
    target = torch.zeros(N, device=device, dtype=torch.int64)
    with fused_lm.use_backend(backend):
        loss = _call((x, *leaves), target, chunk_rows=6, reduction="sum")
    for gradient in torch.autograd.grad(loss, leaves):
        assert bool((gradient[0] == sums[0]).all()) and bool((gradient[1:] == sums[1]).all())


@pytest.mark.parametrize("backend", SLOW_KERNELS)
def test_no_rows_and_no_row_that_counts(backend: str, device: torch.device) -> None:
    for rows in (0, 5):
        x = torch.randn(rows, 4, device=device, requires_grad=True)
        weight = torch.randn(6, 4, device=device, requires_grad=True)
        target = torch.full((rows,), -100, device=device)
        with fused_lm.use_backend(backend):
            loss = fused_lm.linear_cross_entropy(x, weight, target, chunk_rows=2)
        assert loss.isnan()
        for g in torch.autograd.grad(loss, (x, weight)):
            assert not g.any()


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction: str, backend: str, device: torch.device) -> None:
    inputs, target = _inputs(Case("", (5,), 3, 7, F32, True), device)
    options = {**ALL_OPTIONS, "reduction": reduction}

    def curvature(run: Any, leaves: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(total, leaves)]

    def ours(*leaves: Tensor) -> Tensor:
        with fused_lm.use_backend(backend):
            return _call(leaves, target, chunk_rows=2, **options)

    got = curvature(ours, [t.clone().requires_grad_() for t in inputs])
    exact = curvature(
        lambda *leaves: formula(F.linear(*leaves), target, **options),
        [t.double().requires_grad_() for t in inputs],
    )
    for mine, truth in zip(got, exact, strict=True):
        assert (mine - truth).abs().max() <= 1e3 * torch.finfo(F32).eps * truth.abs().max()
    if backend == "reference":
        leaves = [t.double().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("backend", ["auto", *SLOW_KERNELS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_transforms(reduction: str, backend: str, device: torch.device) -> None:
    x, weight = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 5, 8), (11, 8))
    )
    target = torch.randint(11, (2, 5), device=device)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        loss = fused_lm.linear_cross_entropy(
            x, weight, target, reduction=reduction, chunk_rows=3, softcap=9.0
        )
        return loss.sin().sum()

    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        eager = step(x, weight)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
        gradients = [torch.autograd.grad(t, (x, weight)) for t in (eager, compiled)]
        transformed = torch.func.grad(step, (0, 1))(x.detach(), weight.detach())
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(transformed, gradients[0])


def test_two_graphs_for_any_number_of_rows() -> None:
    """Dispatch compares the rows with one constant: below it PyTorch runs, above it the chunks."""
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    weight = torch.randn(7, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, target: fused_lm.linear_cross_entropy(x, weight, target),
        fullgraph=True,
        backend=count,
        dynamic=True,
    )
    for n, N in enumerate((5, 900, 5119, 5120, 8192, 9001)):
        x, target = torch.randn(N, 4), torch.randint(7, (N,))
        exact = formula(F.linear(x, weight), target)
        torch.testing.assert_close(compiled(x, target), exact)
        assert len(graphs) == (1 if n < 3 else 2)


@pytest.mark.parametrize("backend", SLOW_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, backend: str, device: torch.device) -> None:
    x, weight, bias = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((5, 4), (7, 4), (7,))
    )
    bias = bias if reduction == "mean" else None
    target = torch.tensor([1, -100, 3, 6, 0], device=device)
    options = (-100, 0.1, 0.01, 5.0, reduction, 2, True, True, bias is not None, backend)
    arguments = (x, weight, bias, target, *options)
    ops = torch.ops.fused_lm
    torch.library.opcheck(ops.linear_cross_entropy_fwd.default, arguments)
    dloss = torch.randn(() if reduction == "mean" else 5, device=device, requires_grad=True)
    torch.library.opcheck(ops.linear_cross_entropy_bwd.default, (dloss, *arguments))


@pytest.mark.parametrize("backend", SLOW_KERNELS)
def test_repeats_bitwise_and_backwards_twice(backend: str, device: torch.device) -> None:
    inputs, target = _inputs(Case("", (40,), bias=True), device)
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with fused_lm.use_backend(backend):
            loss = _call(tuple(leaves), target, chunk_rows=6)
        results.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        results.append(torch.autograd.grad(loss, leaves))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


x, w, t = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
BAD_CALLS = [
    ((x, w[:, :7], t), {}, ValueError, "and weight [V, C], got x [3, 8], weight [5, 7]"),
    ((x, w[0], t), {}, ValueError, "and weight [V, C], got x [3, 8], weight [8]"),
    ((x, w[:0], t), {}, ValueError, "V >= 1 and C >= 1, got x [3, 8], weight [0, 8]"),
    ((x, w, t), {"bias": x[0]}, ValueError, "bias must be [V]"),
    ((x, w.int(), t), {}, TypeError, "takes float tensors, got weight torch.int32"),
    ((x, w.to("meta"), t), {}, TypeError, "one device, got x on cpu, weight on meta"),
    ((x, w, t[:2]), {}, ValueError, "the shape of x without its last dim, got x [3, 8]"),
    ((x, w, t + 5), {}, IndexError, "target must be in [0, 5)"),
    ((x, w, t), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
]


@pytest.mark.parametrize("args, options, error, text", BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(args: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        fused_lm.linear_cross_entropy(*args, **options)
    assert text in str(caught.value)


def test_pytorch_takes_one_chunk_only() -> None:
    assert fused_lm.why("linear_cross_entropy", x, w, t).backend == "pytorch"
    said = fused_lm.why("linear_cross_entropy", x, w, t, chunk_rows=2)
    assert said.backend == "reference" and "more than one chunk here" in str(said)
    many = (
        torch.zeros(8192, 8, device="meta"),
        w.to("meta"),
        torch.zeros(8192, device="meta").long(),
    )
    assert fused_lm.why("linear_cross_entropy", *many).backend == "reference"
