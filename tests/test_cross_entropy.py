"""``fused_lm.cross_entropy`` against the formula in fp64 and PyTorch's, on every backend that runs
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
from tests import oracle
from tests.gpu import CUDA, harness_later

BACKENDS = ("reference", "pytorch", "triton", *CUDA)
KERNELS = ("reference", "triton", *CUDA)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (5, 64)
    dtype: torch.dtype = F32
    options: dict[str, Any] = field(default_factory=dict)
    target_dtype: torch.dtype = torch.int64
    size: float = 3.0
    offset: float = 0.0
    backends: tuple[str, ...] = BACKENDS


ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
CASES = [
    Case("plain"),
    Case("plain, sum", options={"reduction": "sum"}),
    Case("plain, none", options={"reduction": "none"}),
    Case("fp64", dtype=F64, backends=("reference", "pytorch")),
    Case("fp64, all options", dtype=F64, options=ALL_OPTIONS, backends=("reference",)),
    Case("one class: loss 0", (6, 1)),
    Case("7 classes, many rows, bf16", (33, 7), BF16),
    Case("7 classes, fp16", (9, 7), F16),
    Case("ragged vocabulary, bf16", (4, 1009), BF16),
    Case("ragged vocabulary, fp16, all options", (4, 257), F16, ALL_OPTIONS, backends=KERNELS),
    Case("wider than a program's registers, odd rows", (3, 16411), BF16),
    Case("wide, fp32, all options", (2, 16390), F32, ALL_OPTIONS, backends=KERNELS),
    Case("three dims", (2, 3, 40)),
    Case("three dims, none, bf16", (2, 3, 40), BF16, {"reduction": "none"}),
    Case("one row without dims", (40,)),
    Case("label smoothing", options={"label_smoothing": 0.2}),
    Case("nothing but smoothing, none", options={"label_smoothing": 1.0, "reduction": "none"}),
    Case("z-loss", options={"z_loss": 0.1}, backends=KERNELS),
    Case("softcap, bf16", dtype=BF16, options={"softcap": 2.0}, backends=KERNELS),
    Case("all options, none", options={**ALL_OPTIONS, "reduction": "none"}, backends=KERNELS),
    Case("a class as ignore_index", (40, 5), options={"ignore_index": 3}),
    Case("int32 targets", target_dtype=torch.int32),
    Case("uint8 targets, beside ignore_index -100", target_dtype=torch.uint8),
    Case("logits of +-1e4", size=1e4),
    Case("all logits about 1e4: lse has no digits left for the loss", offset=1e4),
    Case("the same, wide rows", (2, 16411), offset=1e4),
    Case("logits of 1e4 under a softcap", size=1e4, options={"softcap": 30.0}, backends=KERNELS),
]


def _problem(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    logits = torch.randn(case.shape, device=device) * case.size + case.offset
    target = torch.randint(case.shape[-1], case.shape[:-1], device=device)
    if target.dim() and target.shape[0] > 2 and case.target_dtype.is_signed:
        target[1] = case.options.get("ignore_index", -100)
    return logits.to(case.dtype), target.to(case.target_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    if backend not in case.backends:
        pytest.skip("the backend refuses this call")
    logits, target = _problem(case, device)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return (fused_lm.cross_entropy(x, target, **case.options),)

    def exact(x: Tensor) -> tuple[Tensor, ...]:
        return (formula(x, target, **case.options),)

    oracle.check_against_oracle(ours, exact, [logits], ["loss", "dlogits"])
    with torch.no_grad():
        wide = F64 if case.dtype == F64 else F32
        assert ours(logits)[0].dtype == wide


EDGES = {
    "no row counts": (torch.full((4,), -100), ()),
    "some rows count": (torch.tensor([0, -100, 2, -100]), ()),
    "masked classes": (torch.tensor([0, 1, 2, 4]), (3, 5)),
    "a masked target": (torch.tensor([0, 1, 2, 3]), (3,)),
    "no rows": (torch.empty(0, dtype=torch.int64), ()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_torchs(
    edge: str, smoothing: float, reduction: str, backend: str, device: torch.device
) -> None:
    """NaN, inf and zeros stand where torch has them, in the loss and in the gradient."""
    target, masked = EDGES[edge]
    logits = torch.randn(target.shape[0], 6)
    logits[:, masked] = -torch.inf
    options = {"label_smoothing": smoothing, "reduction": reduction}
    target, results = target.to(device), []
    for function in (fused_lm.cross_entropy, F.cross_entropy):
        leaf = logits.to(device).requires_grad_()
        with fused_lm.use_backend(backend):
            loss = function(leaf, target, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_take_no_part(backend: str, device: torch.device) -> None:
    """Not even where their logits are NaN and inf."""
    logits = torch.randn(6, 30, device=device)
    target = torch.randint(30, (6,), device=device)
    target[2] = target[4] = -100
    spoiled = logits.clone()
    spoiled[2], spoiled[4, 5] = torch.nan, torch.inf
    found = []
    for t in (logits, spoiled) if backend != "pytorch" else (logits, logits + 0.0):
        leaf = t.requires_grad_()
        with fused_lm.use_backend(backend):
            loss = fused_lm.cross_entropy(leaf, target)
        found += [loss.detach(), *torch.autograd.grad(loss, leaf)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not found[1][[2, 4]].any() and bool(found[1][[0, 1, 3, 5]].all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=["made with the loss", "made in the backward"])
def test_strides_and_repeated_backwards(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Transposed, expanded and padded logits; expanded and transposed incoming gradients; twice."""
    target = torch.randint(20, (4, 3), device=device)
    plain = torch.randn(4, 3, 20, device=device).to(dtype)
    expanded = plain[:, :1].expand(4, 3, 20)
    padded = torch.zeros(4, 3, 32, device=device, dtype=dtype)[..., :20].copy_(plain)
    one = torch.ones((), device=device).expand(4, 3)
    cotangents = (one, torch.randn(3, 4, device=device).t(), one)

    def gradients(x: Tensor, function: Any) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        loss = function(leaf, target, reduction="none")
        return [torch.autograd.grad(loss, leaf, c, retain_graph=True)[0] for c in cotangents]

    for layout in (plain, plain.transpose(0, 2).contiguous().transpose(0, 2), padded, expanded):
        with fused_lm.use_backend(backend):
            strided, dense = (
                gradients(x, fused_lm.cross_entropy) for x in (layout, layout.contiguous())
            )
        for got, same, exact in zip(
            strided, dense, gradients(layout.double(), formula), strict=True
        ):
            oracle.check_strided(got, same, exact, backend)
        torch.testing.assert_close(strided[0], strided[2])
        assert not torch.equal(strided[0], strided[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_loss_scale_is_a_factor(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """An fp16 gradient of a mean has its digits when it was scaled before it was rounded."""
    logits = (torch.rand(100, 9, device=device) * -9.0).to(dtype).requires_grad_()
    target = torch.randint(9, (100,), device=device)
    with fused_lm.use_backend(backend):
        (scaled,) = torch.autograd.grad(fused_lm.cross_entropy(logits, target) * 2.0**14, logits)
    wide = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(wide, target) * 2.0**14, wide)
    relative = (scaled.double() - exact).abs() / exact.abs()
    assert relative.max() <= 2 * torch.finfo(dtype).eps + 64 * torch.finfo(F32).eps


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(reduction: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    target = torch.randint(50, (3, 4), device=device)
    source = torch.randn(3, 4, 64, device=device).to(dtype).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}

    def run(in_place: bool) -> tuple[Tensor, Tensor]:
        logits = (source * 1.0)[..., :50]  # rows further apart than they are long
        gradients: list[Tensor] = []
        logits.register_hook(gradients.append)
        loss = fused_lm.cross_entropy(logits, target, inplace_backward=in_place, **options)
        before = logits.detach().clone()
        assert torch.equal(logits, before)
        loss.mean().backward()
        assert (gradients[0].data_ptr() == logits.data_ptr()) == in_place
        assert torch.equal(logits, before) != in_place
        return loss, gradients[0]

    with fused_lm.use_backend(backend):
        (loss, gradient), (plain_loss, plain_gradient) = run(True), run(False)
    assert torch.equal(loss, plain_loss)
    torch.testing.assert_close(gradient, plain_gradient, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_misuse_of_in_place_raises(backend: str, device: torch.device) -> None:
    source = torch.randn(4, 9, device=device).requires_grad_()
    target = torch.randint(9, (4,), device=device)

    def loss_of(logits: Tensor) -> Tensor:
        with fused_lm.use_backend(backend):
            return fused_lm.cross_entropy(logits, target, inplace_backward=True)

    loss = loss_of(source * 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = source * 1.0
    other = logits.square().sum()  # autograd keeps the logits for it
    loss_of(logits).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="second derivatives need"):
        torch.autograd.grad(loss_of(source * 1.0), source, create_graph=True)
    with pytest.raises(ValueError, match="got a leaf"):
        loss_of(source)
    with pytest.raises(ValueError, match=r"got logits \[4, 9\] with strides \[0, 1\]"):
        loss_of((source[:1] * 1.0).expand(4, 9))
    with pytest.raises(ValueError, match=r"with strides \[1, 9\]"):
        target = target[:1].expand(9)
        loss_of((source * 1.0).t()[:, :4])
    with torch.no_grad():
        logits = source * 1.0
        loss_of_no_graph = fused_lm.cross_entropy(source, target[:4], inplace_backward=True)
        assert torch.equal(logits, source) and not loss_of_no_graph.requires_grad


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction: str, backend: str, device: torch.device) -> None:
    logits, direction = (torch.randn(4, 7, device=device) for _ in range(2))
    target = torch.tensor([1, -100, 3, 6], device=device)
    options = {**ALL_OPTIONS, "reduction": reduction}

    def curvature(run: Any, x: Tensor) -> tuple[Tensor, ...]:
        loss = run(x, target, **options)
        (first,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
        return first, *torch.autograd.grad((first * direction.to(x.dtype)).sum(), x)

    with fused_lm.use_backend(backend):
        got = curvature(fused_lm.cross_entropy, logits.clone().requires_grad_())
    exact = curvature(formula, logits.double().requires_grad_())
    for ours, truth in zip(got, exact, strict=True):
        assert (ours - truth).abs().max() <= 1e2 * torch.finfo(F32).eps * truth.abs().max()
    if backend == "reference":
        wide = logits.double().requires_grad_()
        with fused_lm.use_backend(backend):
            run = lambda x: fused_lm.cross_entropy(x, target, **options)  # noqa: E731
            assert torch.autograd.gradcheck(run, (wide,))
            assert torch.autograd.gradgradcheck(run, (wide,))


@pytest.mark.parametrize("backend", ["auto", *harness_later(KERNELS)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compile_and_transforms(
    in_place: bool, reduction: str, backend: str, device: torch.device
) -> None:
    x = torch.randn(2, 3, 16, device=device, requires_grad=True)
    target = torch.randint(16, (2, 3), device=device)

    def step(x: Tensor) -> Tensor:
        loss = fused_lm.cross_entropy(
            x * 2.0, target, reduction=reduction, label_smoothing=0.1, inplace_backward=in_place
        )
        return loss.sin().sum()

    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        eager = step(x)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        gradients = [torch.autograd.grad(t, x)[0] for t in (eager, compiled)]
        transformed = torch.func.grad(step)(x.detach())
        rows = torch.func.vmap(lambda a, t: fused_lm.cross_entropy(a, t, reduction=reduction))
        batched = rows(x.detach(), target)
        whole = fused_lm.cross_entropy(x.detach(), target, reduction=reduction)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(transformed, gradients[0])
    torch.testing.assert_close(batched if reduction == "none" else batched.mean(), whole)


@pytest.mark.parametrize("backend", harness_later(KERNELS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, backend: str, device: torch.device) -> None:
    logits = torch.randn(5, 12, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3, 11, 0], device=device)
    options = (-100, 0.1, 0.01, 5.0, reduction)
    ops = torch.ops.fused_lm
    for gradient in ("never", "with the loss", "in the backward"):
        arguments = (logits, target, *options, gradient, backend)
        torch.library.opcheck(ops.cross_entropy_fwd.default, arguments)
    dloss = torch.randn(() if reduction == "mean" else 5, device=device, requires_grad=True)
    torch.library.opcheck(ops.cross_entropy_bwd.default, (dloss, logits, target, *options, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_is_handed_over(backend: str, device: torch.device) -> None:
    """The backward of a mean allocates nothing: what the forward made goes on as it is."""
    source = torch.randn(8, 33, device=device, requires_grad=True)
    target = torch.randint(33, (8,), device=device)
    logits = source * 1.0
    gradients: list[Tensor] = []
    logits.register_hook(gradients.append)
    with fused_lm.use_backend(backend):
        loss = fused_lm.cross_entropy(logits, target)
    made = loss.grad_fn.saved_tensors[2]
    address, expected = made.data_ptr(), made.clone() * 0.5
    loss.backward(torch.tensor(0.5, device=device))
    assert gradients[0].data_ptr() == address
    torch.testing.assert_close(gradients[0], expected)


x, t = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
BAD_CALLS = [
    ((torch.tensor(1.0), t), {}, ValueError, "logits [..., V] with V >= 1, got logits []"),
    ((x[:, :0], t), {}, ValueError, "V >= 1, got logits [3, 0]"),
    ((x.int(), t), {}, TypeError, "takes float logits, got torch.int32"),
    ((x, t.float()), {}, TypeError, "target must hold integers, got torch.float32"),
    ((x, t[:2]), {}, ValueError, "without its last dim, got logits [3, 8], target [2]"),
    ((x, t.to("meta")), {}, TypeError, "one device, got logits on cpu, target on meta"),
    ((x, t + 8), {}, IndexError, "target must be in [0, 8) or ignore_index -100, got 8"),
    ((x, t - 1), {}, IndexError, "ignore_index -100, got -1"),
    ((x, t), {"label_smoothing": 1.5}, ValueError, "between 0 and 1, got 1.5"),
    ((x, t), {"z_loss": -1.0}, ValueError, "z_loss must not be negative, got -1.0"),
    ((x, t), {"softcap": -1.0}, ValueError, "softcap must not be negative (0 is none), got -1.0"),
    ((x, t), {"reduction": "avg"}, ValueError, "one of mean, sum, none, got 'avg'"),
]


@pytest.mark.parametrize("args, options, error, text", BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(args: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        fused_lm.cross_entropy(*args, **options)
    assert text in str(caught.value)


def test_dispatch_says_why() -> None:
    said = str(fused_lm.why("cross_entropy", x, t, softcap=2.0, z_loss=0.1))
    assert "PyTorch's cross entropy has no softcap" in said and "-> reference" in said
    said = str(fused_lm.why("cross_entropy", x, t, inplace_backward=True))
    assert "inplace_backward needs a kernel" in said and "-> reference" in said
    assert fused_lm.why("cross_entropy", x.double(), t).backend == "pytorch"
