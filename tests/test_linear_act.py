"""``fused_lm.linear_act`` against the formula in fp64, on every backend that runs here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas
from fused_lm.tolerance import check_close
from tests import oracle
from tests.simt import backend as simt

BACKENDS = ("reference", "pytorch", "triton")
KERNELS = ("reference", "triton")
CUDA = simt.BACKENDS
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GATED = ("swiglu", "geglu", "geglu_tanh")
PLAIN = ("relu", "relu_squared", "silu", "gelu", "gelu_tanh", "none")


@dataclass(frozen=True)
class Case:
    """x [*shape], F wide; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (19, 40)
    F: int = 24
    activation: str = "gelu"
    dtype: torch.dtype = F32
    bias: bool = True
    transposed: bool = False
    scale: float = 1.0


CASES = [
    *(Case(f"{name}", activation=name) for name in (*PLAIN, *GATED)),
    *(Case(f"{name}, fp16", activation=name, dtype=F16) for name in (*PLAIN, *GATED)),
    Case("bf16", dtype=BF16),
    Case("several tiles and steps, all ragged", (70, 150), 130),
    Case("several tiles, all ragged, bf16", (70, 150), 130, "swiglu", BF16),
    Case("sizes that fill tiles", (128, 64), 128, dtype=BF16),
    Case("more rows than one part of the weight gradient", (1100, 8), 8, dtype=BF16),
    Case("longer sums than one accumulator has, ragged", (5, 1100), 6),
    Case("longer sums than one accumulator has, gated", (5, 1040), 6, "swiglu", transposed=True),
    Case("width 1", (3, 1), 1),
    Case("one row", (1, 7), 5),
    Case("one dim", (9,), 5),
    Case("three dims", (2, 3, 16), 8, "silu"),
    Case("no bias", bias=False),
    Case("no bias, no activation", bias=False, activation="none"),
    Case("weight as Conv1D keeps it", transposed=True),
    Case("gated, as Conv1D keeps it, bf16", activation="geglu", dtype=BF16, transposed=True),
    Case("pre-activations of 1e4: tails of every activation", scale=1e4, activation="gelu_tanh"),
    Case("pre-activations of 1e4, silu", scale=1e4, activation="silu"),
    Case("pre-activations of 1e4, gated, bf16", (40, 40), 24, "geglu", BF16, scale=1e4),
]


def _cases_of_backends() -> list[object]:
    """Every case on every backend that takes it."""
    return [
        pytest.param(case, backend, id=f"{case.why}-{backend}")
        for case in CASES
        for backend in (*BACKENDS, *(CUDA if _in_cuda(case) else ()))
    ]


def _in_cuda(case: Case) -> bool:
    whole = case.shape[-1] % 8 == 0 and case.F % 8 == 0
    return whole and case.dtype != F32


def _dtype_of(backend: str) -> torch.dtype:
    """What a backend's kernels take."""
    return BF16 if backend in CUDA else F32


def inputs_of(case: Case, device: torch.device) -> list[Tensor]:
    C, out = case.shape[-1], case.F * (2 if case.activation in GATED else 1)
    shape = (C, out) if case.transposed else (out, C)
    tensors = [
        torch.randn(case.shape, device=device) * case.scale,
        torch.randn(shape, device=device) * C**-0.5,
    ]
    if case.bias:
        tensors.append(torch.randn(out, device=device))
    return [t.to(case.dtype) for t in tensors]


@pytest.mark.parametrize(("case", "backend"), _cases_of_backends())
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_act(
                x, weight, bias, activation=case.activation, transposed=case.transposed
            )
        return (y,)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return (formulas.linear_act(x, weight, bias, case.activation, case.transposed),)

    names = ("y", "dx", "dweight", "dbias")[: 4 if case.bias else 3]
    oracle.check_against_oracle(ours, formula, inputs_of(case, device), names)


@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_gradients_in_fp64(activation: str) -> None:
    x, weight, bias = (t.double().requires_grad_() for t in inputs_of(
        Case("", (3, 4), 3, activation), torch.device("cpu")
    ))  # fmt: skip

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_lm.linear_act(x, weight, bias, activation=activation)

    with fused_lm.use_backend("reference"):
        assert torch.autograd.gradcheck(call, (x, weight, bias))
        if not activation.startswith("relu"):  # their second derivative jumps
            assert torch.autograd.gradgradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
@pytest.mark.parametrize("grad_dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(37, 24), (1100, 8)], ids=["one part", "split sum"])
def test_weight_gradient_is_added_into_a_given_one(
    shape: tuple[int, int], grad_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x, weight, bias = inputs_of(Case("", shape, 16, dtype=BF16), device)
    held = torch.randn(weight.shape, device=device).to(grad_dtype)
    dy = torch.randn(shape[0], 16, device=device).to(BF16)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = formulas.linear_act(*leaves, "gelu")
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    total = held.clone()
    with fused_lm.use_backend(backend):
        fused_lm.linear_act(*leaves, weight_grad=total).backward(dy)
    assert leaves[1].grad is None
    exact, same = run(F64), run(BF16)
    sums = [held.to(t.dtype) + t for t in (same[1].float(), exact[1])]
    check_close(total, sums[0].to(grad_dtype), sums[1], "weight_grad")
    check_close(leaves[0].grad, same[0], exact[0], "dx")
    check_close(leaves[2].grad, same[2], exact[2], "dbias")


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow) if b == "triton" else b for b in KERNELS]
)
def test_many_small_steps_lose_nothing_in_an_fp32_gradient(
    backend: str, device: torch.device
) -> None:
    """512 + 512 x 1: bf16 would stay at 512, because 513 is not a bf16 number."""
    x = torch.ones(1, 1, device=device, dtype=BF16)
    weight = x.clone().requires_grad_()
    total = torch.full((1, 1), 512.0, device=device)
    with fused_lm.use_backend(backend):
        for _ in range(512):
            y = fused_lm.linear_act(x, weight, activation="none", weight_grad=total)
            y.backward(x)
    assert total.item() == 1024.0


def test_long_fp32_sums_err_by_the_last_bits(device: torch.device) -> None:
    """Over 16391 tokens, as if summed exactly and then rounded: the largest error of 4096 sums
    in one accumulator is 15 eps of the largest sum in the interpreter, 60 on a GPU.
    """
    dy, x = (torch.rand(16391, 64, device=device) for _ in range(2))
    weight = torch.empty(64, 64, device=device)
    _, dweight, _ = torch.ops.fused_lm.linear_act_bwd(
        dy, x, weight, None, x[:0, 0], "none", False, False, False, True, "triton"
    )
    exact = dy.double().T @ x.double()
    check_close(dweight, exact.float(), exact, "dweight")


@pytest.mark.parametrize("backend", (*BACKENDS, *CUDA))
def test_only_what_is_asked_for(backend: str, device: torch.device) -> None:
    """Frozen weights, as under LoRA: the gradient of x alone, and the same one."""
    case = Case("", activation="silu", dtype=_dtype_of(backend))
    x, weight, bias = inputs_of(case, device)
    results = []
    for trained in (True, False):
        leaves = [x.clone().requires_grad_()]
        leaves += [t.clone().requires_grad_(trained) for t in (weight, bias)]
        with fused_lm.use_backend(backend):
            fused_lm.linear_act(*leaves, activation="silu").square().sum().backward()
        assert all((leaf.grad is not None) == trained for leaf in leaves[1:])
        results.append(leaves[0].grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_strides(backend: str, device: torch.device) -> None:
    """Transposed x and weight, a gradient of stride 0: read as they lie, equal to their copies."""
    x, weight, bias = inputs_of(Case("", (24, 40), 32, dtype=_dtype_of(backend)), device)
    results = []
    for make in (lambda t: t.T.contiguous().T, lambda t: t.contiguous()):
        leaves = [make(x).requires_grad_(), make(weight).requires_grad_(), bias.clone()]
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_act(*leaves)
        results.append((y, *torch.autograd.grad(y.sum(), leaves[:2])))
    exact = [t.double() for t in results[1]]
    for name, got, same, wide in zip(("y", "dx", "dweight"), *results, exact, strict=True):
        check_close(got, same, wide, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    x, weight, bias = inputs_of(Case("", shape, 6, "swiglu"), device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_act(*leaves, activation="swiglu")
    y.sum().backward()
    assert y.shape == (*shape[:-1], 6)
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "swiglu"])
def test_nan_is_not_lost(activation: str, backend: str, device: torch.device) -> None:
    x, weight, bias = inputs_of(Case("", (4, 8), 6, activation), device)
    x[2, 3] = float("nan")
    with fused_lm.use_backend(backend):
        y = fused_lm.linear_act(x, weight, bias, activation=activation)
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("activation", [*PLAIN, "swiglu"])
def test_opcheck(activation: str) -> None:
    keep = activation not in ("none", "relu")
    x, weight, bias = (t.requires_grad_() for t in inputs_of(
        Case("", (5, 8), 6, activation), torch.device("cpu")
    ))  # fmt: skip
    torch.library.opcheck(
        torch.ops.fused_lm.linear_act_fwd.default,
        (x, weight, bias, None, activation, False, keep, "reference"),
    )
    pre = torch.randn(5, 12 if activation == "swiglu" else 6) if activation != "none" else x[:0, 0]
    arguments = (x, weight, bias, pre, activation, False, True, True)
    torch.library.opcheck(
        torch.ops.fused_lm.linear_act_bwd.default,
        (torch.randn(5, 6), *arguments, True, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.fused_lm.linear_act_bwd_add.default,
        (torch.randn(5, 6), *arguments, False, torch.zeros_like(weight), "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_the_fake_kernel_knows_the_strides(backend: str, device: torch.device) -> None:
    """Of a transposed weight's gradient too, on which a compiler builds."""
    x, pre, dy = torch.randn(5, 8), torch.randn(5, 6), torch.randn(6, 5).T
    weight, bias = torch.randn(8, 6).T, torch.randn(6)
    arguments = (dy, x, weight, bias, pre, "silu", False, True, True, True, backend)
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(
        torch.ops.fused_lm.linear_act_bwd.default, moved, test_utils=("test_faketensor",)
    )


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
@pytest.mark.parametrize("add", [False, True], ids=["new gradient", "given gradient"])
def test_compiled_equals_eager(add: bool, backend: str, device: torch.device) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor, total: Tensor | None) -> Tensor:
        return fused_lm.linear_act(x, weight, bias, weight_grad=total)

    results = []
    x, weight, bias = inputs_of(Case("", (2, 5, 16), 8, dtype=_dtype_of(backend)), device)
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        total = torch.ones_like(weight) if add else None
        with fused_lm.use_backend(backend):
            y = function(*leaves, total)
            y.square().sum().backward()
        grads = [total if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append([y, *grads])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_a_given_gradient_is_no_saved_tensor(backend: str, device: torch.device) -> None:
    """The buffer itself gets the sum: under hooks that hand out copies (offloading), over several
    calls, with a zero_() in between, from one graph twice.
    """
    x, weight, bias = inputs_of(Case("", dtype=_dtype_of(backend)), device)
    leaf = weight.clone().requires_grad_()
    with fused_lm.use_backend(backend):
        total = torch.zeros_like(weight)
        fused_lm.linear_act(x, leaf, bias, weight_grad=total).sum().backward()
        once, total = total, torch.zeros_like(weight)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            first = fused_lm.linear_act(x, leaf, bias, weight_grad=total)
            second = fused_lm.linear_act(x, leaf, bias, weight_grad=total)
        total.zero_()
        (first + second).sum().backward(retain_graph=True)
        torch.testing.assert_close(total, 2 * once)
        first.sum().backward()
        torch.testing.assert_close(total, 3 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_changed_in_place(backend: str, device: torch.device) -> None:
    x, weight, bias = inputs_of(Case("", (2, 3, 8), 8), device)
    leaf = x.clone().requires_grad_()
    calls = (
        lambda: fused_lm.linear_act(leaf, weight, bias),
        lambda: fused_lm.ffn(leaf, weight, weight),
        lambda: fused_lm.layer_norm(leaf, bias, bias, residual=leaf, return_residual=True)[0],
        lambda: fused_lm.rms_norm(leaf, bias),
    )
    with fused_lm.use_backend(backend):
        for call in calls:
            y = call()
            y += 1.0
            y.sum().backward()


def test_no_inputs_at_all(device: torch.device) -> None:
    """A sum over nothing is the bias, as torch's linear has it."""
    x, weight = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 0), (5, 0))
    )
    bias = torch.randn(5, device=device)
    for backend in BACKENDS:
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_act(x, weight, bias, activation="none")
        y.sum().backward()
        assert torch.equal(y, bias.expand(2, 3, 5))


def test_a_given_gradient_in_a_transform_is_refused() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)

    def loss(weight: Tensor) -> Tensor:
        return fused_lm.linear_act(x, weight, weight_grad=torch.zeros(5, 4)).sum()

    with fused_lm.use_backend("reference"), pytest.raises(RuntimeError, match="no part of torch"):
        torch.func.grad(loss)(weight)


@pytest.mark.parametrize("held", [torch.zeros(5, 4).double(), torch.zeros(5, 4).long()])
def test_a_given_gradient_of_another_kind_is_refused(held: Tensor) -> None:
    with pytest.raises(TypeError, match="must be fp32, fp16, bf16 or of its weight's dtype"):
        fused_lm.linear_act(torch.randn(3, 4), torch.randn(5, 4), weight_grad=held)
    with pytest.raises(ValueError, match="must not be expanded"):
        fused_lm.linear_act(
            torch.randn(3, 4), torch.randn(5, 4), weight_grad=torch.zeros(1, 4).expand(5, 4)
        )


def test_no_second_derivative_of_a_sum_in_place() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with fused_lm.use_backend("reference"):
        y = fused_lm.linear_act(x, weight, weight_grad=torch.zeros(5, 4))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.sum(), (x, weight), create_graph=True, allow_unused=True)


def test_transforms_follow_the_reference() -> None:
    x, weight = torch.randn(6, 4), torch.randn(5, 4)

    def loss(x: Tensor) -> Tensor:
        return fused_lm.linear_act(x, weight, activation="silu").square().sum()

    with fused_lm.use_backend("reference"):
        per_row = torch.func.vmap(torch.func.grad(loss))(x)
        leaf = x.clone().requires_grad_()
        whole = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(per_row, whole)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_autocast(backend: str, device: torch.device) -> None:
    x, weight, bias = inputs_of(Case("", (12, 16), 8), device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with fused_lm.use_backend(backend), torch.autocast(device.type, BF16):
        y = fused_lm.linear_act(*leaves)
    with fused_lm.use_backend(backend):
        narrow = fused_lm.linear_act(*(t.to(BF16) for t in (x, weight, bias)))
    y.sum().backward()
    assert y.dtype == BF16 and torch.equal(y, narrow)
    assert all(leaf.grad is not None and leaf.grad.dtype == F32 for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"activation": "tanh"}, ValueError, "activation must be one of gelu"),
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight must be \[out, in\] with in = 8"),
        ({"transposed": True}, ValueError, r"weight must be \[in, out\] with in = 8"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[out\]"),
        ({"weight": torch.zeros(6, 8).half()}, TypeError, "one dtype, got torch.float32 and"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "expected a float tensor"),
        ({"weight_grad": torch.zeros(8, 6)}, ValueError, "weight_grad must have the shape"),
        ({"activation": "swiglu", "weight": torch.zeros(7, 8), "bias": None}, ValueError, "even"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)}
    with pytest.raises(error, match=text):
        fused_lm.linear_act(**{**arguments, **change})  # type: ignore[arg-type]
