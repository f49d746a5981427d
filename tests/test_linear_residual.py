"""``fused_lm.linear_residual`` against the formula in fp64, on every backend that runs here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas
from fused_lm.reference.philox import scaled_keep
from tests import oracle
from tests.simt import backend as simt

BACKENDS = ("reference", "pytorch", "triton")
KERNELS = ("reference", "triton")
CUDA = simt.BACKENDS
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """x [*shape], F wide; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (19, 40)
    F: int = 24
    dtype: torch.dtype = F32
    stream: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    transposed: bool = False


CASES = [
    Case("fp32"),
    Case("fp16", dtype=F16),
    Case("bf16, dropout", dtype=BF16, dropout_p=0.3),
    Case("bf16, an fp32 stream", dtype=BF16, stream=F32),
    Case("fp16, an fp32 stream, dropout", dtype=F16, stream=F32, dropout_p=0.1),
    Case("a weight as Conv1D keeps it", dtype=BF16, dropout_p=0.1, transposed=True),
    Case("no bias", dtype=BF16, bias=False),
    Case("all dropped", dtype=BF16, dropout_p=1.0),
    Case("several tiles, ragged", (150, 70), 130, dropout_p=0.5),
    Case("several tiles, bf16", (150, 72), 136, BF16, dropout_p=0.5),
    Case("three dims", (2, 5, 16), 8, BF16, dropout_p=0.2),
    Case("one row", (1, 8), 8, BF16),
    Case("odd widths", (3, 7), 5, dropout_p=0.5),
]


def _cases_of_backends() -> list[object]:
    """Every case on every backend that takes it; PyTorch's dropout has a mask of its own."""
    found = []
    for case in CASES:
        whole = case.shape[-1] % 8 == 0 and case.F % 8 == 0 and case.dtype != F32
        backends = [*KERNELS, *(CUDA if whole else ())]
        backends += ["pytorch"] if case.dropout_p == 0.0 else []
        found += [pytest.param(case, b, id=f"{case.why}-{b}") for b in backends]
    return found


def inputs_of(case: Case, device: torch.device) -> list[Tensor]:
    """x, weight, residual and bias."""
    C = case.shape[-1]
    shape = (C, case.F) if case.transposed else (case.F, C)
    tensors = [
        torch.randn(case.shape, device=device).to(case.dtype),
        (torch.randn(shape, device=device) * C**-0.5).to(case.dtype),
        torch.randn(*case.shape[:-1], case.F, device=device).to(case.stream or case.dtype),
    ]
    if case.bias:
        tensors.append(torch.randn(case.F, device=device).to(case.dtype))
    return tensors


@pytest.mark.parametrize(("case", "backend"), _cases_of_backends())
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    drops = case.dropout_p > 0.0
    rng = fused_lm.make_rng(device) if drops else None

    def ours(
        x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return (
                fused_lm.linear_residual(
                    x, weight, bias, residual=residual, dropout_p=case.dropout_p, rng=rng,
                    transposed=case.transposed,
                ),
            )  # fmt: skip

    def formula(
        x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        z = formulas.linear_act(x, weight, bias, "none", case.transposed)
        if rng is not None:
            rows = z.reshape(-1, case.F)
            keep = scaled_keep(rng, 1, 1, *rows.shape, case.dropout_p, F64)[0, 0]
            z = z * keep.view(z.shape).to(z.dtype)
        return (residual + z,)

    names = ("y", "dx", "dweight", "dresidual", "dbias")[: 5 if case.bias else 4]
    oracle.check_against_oracle(ours, formula, inputs_of(case, device), names)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_the_gradient_of_the_stream_is_its_own(backend: str, device: torch.device) -> None:
    """Not a bit of it is lost."""
    x, weight, residual, bias = inputs_of(Case("", dtype=BF16, dropout_p=0.5), device)
    leaf, dy = residual.clone().requires_grad_(), torch.randn_like(residual)
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_residual(x, weight, bias, residual=leaf, dropout_p=0.5)
    y.backward(dy)
    assert leaf.grad is not None and torch.equal(leaf.grad, dy)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_strides(backend: str, device: torch.device) -> None:
    """A turned stream and weight, an expanded bias and gradient: as their copies, to the bit, and
    what comes of them is contiguous, as a compiler is told.
    """
    x, weight, residual, bias = inputs_of(Case("", (24, 40), 32, BF16), device)
    rng, results = fused_lm.make_rng(device), []
    for make in (lambda t: t.T.contiguous().T, lambda t: t.contiguous()):
        leaves = [make(t).requires_grad_() for t in (x, weight, residual)]
        leaves.append(bias[:1].expand(32).requires_grad_())
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_residual(
                leaves[0], leaves[1], leaves[3], residual=leaves[2], dropout_p=0.5, rng=rng
            )
            assert y.is_contiguous()
            results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_only_what_is_asked_for(backend: str, device: torch.device) -> None:
    inputs, rng = inputs_of(Case("", dtype=BF16), device), fused_lm.make_rng(device)

    def gradients(wanted: tuple[int, ...]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        x, weight, residual, bias = leaves
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5, rng=rng)
        return list(torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted]))

    together = gradients((0, 1, 2, 3))
    for i, wanted in enumerate(together):
        assert torch.equal(gradients((i,))[0], wanted)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_nan_is_not_dropped(backend: str, device: torch.device) -> None:
    x, weight, residual, bias = inputs_of(Case("", (140, 40), 24, BF16), device)
    x[7, 3] = float("nan")
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5)
    assert y[7].isnan().all() and y.isnan().sum() == 24


@pytest.mark.parametrize("backend", (*BACKENDS, *CUDA))
def test_dropout_drops_as_many(backend: str, device: torch.device) -> None:
    """Of a layer that is 1 everywhere, and is 0 or 1 / (1 - p) then."""
    x = torch.zeros(64, 8, device=device, dtype=BF16)
    weight, bias = torch.zeros(64, 8, device=device, dtype=BF16), x.new_ones(64)
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_residual(x, weight, bias, residual=x.new_zeros(64, 64), dropout_p=0.25)
    kept = y != 0
    assert 0.68 < kept.float().mean().item() < 0.82
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4 / 3))


def test_gradients_in_fp64() -> None:
    case = Case("", (3, 4), 3, F64)
    leaves = [t.requires_grad_() for t in inputs_of(case, torch.device("cpu"))]
    rng = fused_lm.make_rng("cpu")

    def call(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5, rng=rng)

    with fused_lm.use_backend("reference"):
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(dropout_p: float) -> None:
    x, weight, residual, bias = (
        t.requires_grad_() for t in inputs_of(Case("", (5, 8), 6), torch.device("cpu"))
    )
    rng = fused_lm.make_rng("cpu") if dropout_p else None
    torch.library.opcheck(
        torch.ops.fused_lm.linear_residual_fwd.default,
        (x, weight, bias, residual, rng, dropout_p, False, "reference"),
    )
    torch.library.opcheck(
        torch.ops.fused_lm.linear_residual_bwd.default,
        (torch.randn(5, 6), x, weight, bias, rng, dropout_p, False, True, True, True, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_compiled_equals_eager(backend: str, device: torch.device) -> None:
    rng = fused_lm.make_rng(device)

    def call(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5, rng=rng)

    inputs, results = inputs_of(Case("", (2, 5, 16), 8, BF16), device), []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with fused_lm.use_backend(backend):
            y = function(*leaves)
            y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("backend", (*BACKENDS, *CUDA))
def test_no_rows(backend: str, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in inputs_of(Case("", (2, 0, 8), 8, BF16), device)]
    x, weight, residual, bias = leaves
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5)
        y.sum().backward()
    assert y.shape == (2, 0, 8)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_transforms_follow_the_reference() -> None:
    x, weight, residual, bias = inputs_of(Case("", (6, 4), 5), torch.device("cpu"))

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        return fused_lm.linear_residual(x, weight, bias, residual=residual).square().sum()

    with fused_lm.use_backend("reference"):
        whole = torch.func.grad(loss)(x, residual)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(whole, torch.autograd.grad(loss(leaf, residual), leaf)[0])


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_autocast_leaves_the_stream_as_it_is(backend: str, device: torch.device) -> None:
    inputs = inputs_of(Case("", (12, 16), 8), device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, weight, residual, bias = leaves
    with fused_lm.use_backend(backend), torch.autocast(device.type, BF16):
        y = fused_lm.linear_residual(x, weight, bias, residual=residual)
    y.sum().backward()
    x, weight, residual, bias = (t.to(BF16) for t in inputs)
    with fused_lm.use_backend(backend):
        narrow = fused_lm.linear_residual(x, weight, bias, residual=inputs[2])
    assert y.dtype == F32 and torch.equal(y, narrow)
    assert all(leaf.grad is not None and leaf.grad.dtype == F32 for leaf in leaves)


@pytest.mark.parametrize("backend", (*BACKENDS, *CUDA))
def test_autocast_narrows_a_narrow_stream_to_its_own_dtype(
    backend: str, device: torch.device
) -> None:
    x, weight, residual, bias = inputs_of(Case("", (12, 16), 8), device)
    with fused_lm.use_backend(backend), torch.autocast(device.type, BF16):
        y = fused_lm.linear_residual(x, weight, bias, residual=residual.half())
    assert y.dtype == BF16


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight must be \[out, in\] with in = 8"),
        ({"residual": torch.zeros(3, 8)}, ValueError, r"residual must be \[..., F\] with F = 6"),
        ({"residual": torch.zeros(3, 6).half()}, TypeError, "residual must be torch.float32"),
        ({"dropout_p": 1.5}, ValueError, "between 0 and 1"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, ValueError, "rng must be"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "expected a float tensor"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), "residual": torch.zeros(3, 6)}
    with pytest.raises(error, match=text):
        fused_lm.linear_residual(**{**arguments, **change})  # type: ignore[arg-type]


def test_pytorch_refuses_a_given_mask() -> None:
    x, weight, residual, bias = inputs_of(Case(""), torch.device("cpu"))
    rng = fused_lm.make_rng("cpu")
    with fused_lm.use_backend("pytorch"), pytest.raises(RuntimeError, match="its own mask"):
        fused_lm.linear_residual(x, weight, bias, residual=residual, dropout_p=0.5, rng=rng)
