"""``fused_lm.ffn`` against the formula in fp64, on every backend that runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
ACTIVATIONS = ("relu", "relu_squared", "silu", "gelu", "gelu_tanh", *GATED)
NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias")


@dataclass(frozen=True)
class Case:
    """x [*shape], F wide inside, C2 outside; ``why`` is what it is there for."""

    why: str
    shape: tuple[int, ...] = (19, 24)
    F: int = 40
    C2: int = 24
    activation: str = "gelu"
    dtype: torch.dtype = F32
    bias: bool = True
    transposed: bool = False
    recompute: bool = False


CASES = [
    *(Case(f"{name}", activation=name) for name in ACTIVATIONS),
    *(Case(f"{name}, recomputed, bf16", activation=name, dtype=BF16, recompute=True)
      for name in ACTIVATIONS),
    *(Case(f"{name}, kept, bf16", activation=name, dtype=BF16)
      for name in ACTIVATIONS if name not in GATED),
    Case("fp16", dtype=F16),
    Case("as Conv1D keeps them, several tiles, fp16", (150, 72), 264, 136, "silu", F16,
         transposed=True),
    Case("several tiles and steps, all ragged", (150, 70), 90, 130),
    Case("several tiles, ragged, gated, bf16", (150, 70), 90, 130, "swiglu", BF16, recompute=True),
    Case("sizes that fill tiles", (128, 64), 64, 64, dtype=BF16),
    Case("longer sums than one accumulator has, gated", (5, 600), 6, 530, "swiglu"),
    Case("one row, odd widths", (1, 7), 5, 3),
    Case("one dim", (7,), 5, 3),
    Case("three dims", (2, 3, 16), 8, 16, "silu", recompute=True),
    Case("no biases", bias=False),
    Case("no biases, gated", bias=False, activation="geglu"),
    Case("weights as Conv1D keeps them", transposed=True, recompute=True),
    Case("gated, as Conv1D keeps them, bf16", activation="swiglu", dtype=BF16, transposed=True),
]  # fmt: skip


def inputs_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    C, width = case.shape[-1], case.F * (2 if case.activation in GATED else 1)

    def matrix(out: int, inner: int) -> Tensor:
        weight = torch.randn(out, inner, device=device) * inner**-0.5
        return weight.T.contiguous() if case.transposed else weight

    tensors = {
        "x": torch.randn(case.shape, device=device),
        "up_weight": matrix(width, C),
        "down_weight": matrix(case.C2, case.F),
    }
    if case.bias:
        tensors["up_bias"] = torch.randn(width, device=device)
        tensors["down_bias"] = torch.randn(case.C2, device=device)
    return {name: tensors[name].to(case.dtype) for name in NAMES if name in tensors}


def call(case: Case, tensors: dict[str, Tensor], **options: Any) -> Tensor:
    return fused_lm.ffn(
        **tensors, activation=case.activation, transposed=case.transposed,
        recompute=case.recompute, **options,
    )  # fmt: skip


def formula(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    biases = {"up_bias": None, "down_bias": None}
    return formulas.ffn(
        **{**biases, **tensors}, activation=case.activation, transposed=case.transposed
    )


def _cases_of_backends() -> list[object]:
    """Every case on every backend that takes it."""
    return [
        pytest.param(case, backend, id=f"{case.why}-{backend}")
        for case in CASES
        for backend in (*BACKENDS, *(CUDA if _in_cuda(case) else ()))
    ]


def _in_cuda(case: Case) -> bool:
    whole = all(width % 8 == 0 for width in (case.shape[-1], case.F, case.C2))
    return whole and case.dtype != F32


@pytest.mark.parametrize(("case", "backend"), _cases_of_backends())
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    inputs = inputs_of(case, device)

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return (call(case, dict(zip(inputs, tensors, strict=True))),)

    def truth(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (formula(case, dict(zip(inputs, tensors, strict=True))),)

    names = ("y", *(f"d{name}" for name in inputs))
    oracle.check_against_oracle(ours, truth, list(inputs.values()), names)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_equals_kept_to_the_bit(
    activation: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    inputs = inputs_of(Case("", activation=activation, dtype=dtype), device)
    results = []
    for recompute in (False, True):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with fused_lm.use_backend(backend):
            y = call(Case("", activation=activation, recompute=recompute), leaves)
            y.backward(torch.ones_like(y))
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def saved_elements(case: Case, inputs: dict[str, Tensor], backend: str) -> int:
    """Elements kept for the backward beyond x and the parameters."""
    storages: dict[int, int] = {}
    given = {t.untyped_storage().data_ptr() for t in inputs.values()}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with (
        fused_lm.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        call(case, inputs)
    return sum(size for pointer, size in storages.items() if pointer not in given)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("activation", "recompute", "per_hidden"),
    [("gelu", False, 2), ("gelu", True, 1), ("relu", False, 1), ("relu", True, 1),
     ("swiglu", False, 3), ("swiglu", True, 2)],
)  # fmt: skip
def test_saves_no_more_than_it_says(
    activation: str, recompute: bool, per_hidden: int, backend: str, device: torch.device
) -> None:
    case = Case("", activation=activation, recompute=recompute)
    inputs = {name: t.requires_grad_() for name, t in inputs_of(case, device).items()}
    assert saved_elements(case, inputs, backend) == per_hidden * case.shape[0] * case.F


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_in_fp64(activation: str, recompute: bool) -> None:
    case = Case("", (3, 4), 3, 2, activation, F64, recompute=recompute)
    inputs = inputs_of(case, torch.device("cpu"))

    def function(*tensors: Tensor) -> Tensor:
        return call(case, dict(zip(inputs, tensors, strict=True)))

    leaves = [t.requires_grad_() for t in inputs.values()]
    with fused_lm.use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_frozen_biases_enter_second_derivatives(backend: str, device: torch.device) -> None:
    """The pre-activation is made again for them, and needs a bias that has no gradient itself."""
    inputs = inputs_of(Case("", (5, 4), 6, 3), device)

    def penalty(ffn: Any) -> Tensor:
        leaf = inputs["x"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(ffn({**inputs, "x": leaf}).sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with fused_lm.use_backend(backend):
        ours = penalty(lambda tensors: call(Case(""), tensors))
    torch.testing.assert_close(ours, penalty(lambda tensors: formula(Case(""), tensors)))


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_weight_gradients_are_added_into_given_ones(backend: str, device: torch.device) -> None:
    case = Case("", dtype=BF16, activation="swiglu", recompute=True)
    inputs = inputs_of(case, device)
    dy = torch.randn(19, 24, device=device).to(BF16)

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
        grads = torch.autograd.grad(formula(case, leaves), list(leaves.values()), dy.to(dtype))
        return dict(zip(leaves, grads, strict=True))

    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    totals = {name: torch.ones_like(inputs[name], dtype=F32) for name in NAMES if "weight" in name}
    with fused_lm.use_backend(backend):
        y = call(case, leaves, **{f"{name}_grad": t for name, t in totals.items()})
        y.backward(dy)
    exact, same = run(F64), run(BF16)
    for name, leaf in leaves.items():
        if name in totals:
            assert leaf.grad is None
            check_close(totals[name], 1 + same[name].float(), 1 + exact[name], name)
        else:
            check_close(leaf.grad, same[name], exact[name], name)


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
@pytest.mark.parametrize("trained", ["up_weight", "down_weight"])
def test_one_frozen_weight(trained: str, backend: str, device: torch.device) -> None:
    """The other's gradient goes where it was asked for, given or new."""
    case = Case("", activation="silu", recompute=True)
    if backend in CUDA:
        case = Case("", activation="silu", dtype=BF16)
    inputs = inputs_of(case, device)
    results = []
    for give in (False, True):
        leaves = {name: t.clone().requires_grad_(name == trained) for name, t in inputs.items()}
        totals = {f"{name}_grad": torch.zeros_like(inputs[name]) for name in NAMES if "_w" in name}
        with fused_lm.use_backend(backend):
            call(case, leaves, **(totals if give else {})).square().sum().backward()
        grad = leaves[trained].grad
        assert (grad is None) == give
        results.append(totals[f"{trained}_grad"] if give else grad)
        other = totals["up_weight_grad" if trained == "down_weight" else "down_weight_grad"]
        assert not other.any()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: torch.device) -> None:
    inputs = inputs_of(Case("", (2, 0, 8), activation="swiglu"), device)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with fused_lm.use_backend(backend):
        y = call(Case("", activation="swiglu", recompute=True), leaves)
    y.sum().backward()
    assert y.shape == (2, 0, 24)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("backend", (*KERNELS, *CUDA))
def test_repeats_to_the_bit(backend: str, device: torch.device) -> None:
    inputs = inputs_of(Case("", (1100, 8), 16, 8, dtype=BF16), device)
    results = []
    for _ in range(2):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with fused_lm.use_backend(backend):
            call(Case(""), leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_opcheck(activation: str) -> None:
    inputs = inputs_of(Case("", (5, 8), 6, 4, activation), torch.device("cpu"))
    leaves = [t.requires_grad_() for t in inputs.values()]
    flags = (activation, False, activation != "relu", activation == "relu")
    arguments = (*leaves, None, None, *flags, "reference")
    torch.library.opcheck(torch.ops.fused_lm.ffn_fwd.default, arguments)
    _, pre, hidden = torch.ops.fused_lm.ffn_fwd.default(*arguments)
    saved = (torch.randn(5, 4), *leaves, pre.detach(), hidden.detach(), activation, False)
    torch.library.opcheck(
        torch.ops.fused_lm.ffn_bwd.default,
        (*saved, True, True, True, True, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
    totals = (torch.zeros_like(leaves[1]), torch.zeros_like(leaves[3]))
    torch.library.opcheck(
        torch.ops.fused_lm.ffn_bwd_add.default,
        (*saved, True, True, False, False, *totals, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_equals_eager(backend: str, device: torch.device) -> None:
    case = Case("", (2, 5, 8), 12, 8, "swiglu", recompute=True)
    inputs = inputs_of(case, device)
    results = []
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with fused_lm.use_backend(backend):
            y = function(case, leaves)
            y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"activation": "none"}, ValueError, "activation must be one of gelu"),
        ({"down_weight": torch.zeros(4, 7)}, ValueError, r"down_weight must be .* with in = 6"),
        ({"down_bias": torch.zeros(7)}, ValueError, r"down_bias must be \[out\]"),
        ({"activation": "swiglu"}, ValueError, r"down_weight must be .* with in = 3"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = inputs_of(Case("", (3, 8), 6, 4), torch.device("cpu"))
    with pytest.raises(error, match=text):
        fused_lm.ffn(**{**arguments, **change})  # type: ignore[arg-type]


def test_a_forced_pytorch_says_what_it_cannot(device: torch.device) -> None:
    inputs = inputs_of(Case(""), device)
    grads = {f"{name}_grad": torch.zeros_like(inputs[name]) for name in NAMES if "weight" in name}
    with (
        fused_lm.use_backend("pytorch"),
        pytest.raises(RuntimeError, match="can't add into a given one"),
    ):
        call(Case(""), inputs, **grads)
