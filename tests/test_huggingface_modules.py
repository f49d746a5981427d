"""The drop-ins for transformers' modules, against the classes that they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fused_lm
from fused_lm.integrations import huggingface_modules as modules
from fused_lm.nn.dropin import DropIn
from fused_lm.tolerance import check_close
from tests.gpu import INTERPRETER

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, C, INNER = 2, 5, 32, 48
CONFIG = transformers.BertConfig(
    hidden_size=C, intermediate_size=INNER, hidden_act="gelu", hidden_dropout_prob=0.5
)
CONFIG.mlp_bias = True
CONFIG.activation_function, CONFIG.resid_pdrop = "gelu_new", 0.5
STOCK = sorted(modules.stock_classes(), key=lambda kind: kind.__name__)
BY_NAME = {kind.__name__: kind for kind in STOCK}


def _stock(kind: Any) -> Any:
    """A module of a stock class, in evaluation, with parameters that all matter."""
    name = kind.__name__
    if name == "GPT2MLP":
        module = kind(INNER, CONFIG)
    elif name.endswith("RMSNorm"):
        module = kind(C, eps=0.1)
    else:
        module = kind(CONFIG)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.eval()


def _swapped(stock: Any) -> Any:
    module = copy.deepcopy(stock)
    module.__class__ = modules.own_class(type(stock))
    return module


def _inputs(name: str) -> list[Tensor]:
    if not name.endswith("Output"):
        return [torch.randn(B, T, C)]
    return [torch.randn(B, T, C if name.endswith("SelfOutput") else INNER), torch.randn(B, T, C)]


def _results(module: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    dtype = next(module.parameters()).dtype
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = module(*leaves)
    named = {**{f"input {i}": x for i, x in enumerate(leaves)}, **dict(module.named_parameters())}
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=dtype)
    gradients = torch.autograd.grad((out * weights).sum(), list(named.values()))
    return {"output": out.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize("backend", ["auto", "pytorch", "reference", *INTERPRETER])
@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)
def test_results_are_the_stock_classs(kind: Any, backend: str) -> None:
    stock, inputs = _stock(kind), _inputs(kind.__name__)
    wanted, exact = _results(stock, inputs), _results(copy.deepcopy(stock).double(), inputs)
    with fused_lm.use_backend(backend):
        ours = _swapped(stock)
        got = _results(ours, inputs)
        likely = ours.likely_backend()
    assert likely == ("pytorch" if backend == "auto" else backend)
    for key in wanted:
        if likely == "pytorch":
            assert torch.equal(got[key], wanted[key]), key
        check_close(got[key], wanted[key], exact[key], key)


@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)
def test_a_drop_in_adds_nothing_and_survives(kind: Any) -> None:
    stock, inputs = _stock(kind), _inputs(kind.__name__)
    ours = _swapped(stock)
    assert isinstance(ours, kind) and isinstance(ours, DropIn)
    assert type(ours).stock is kind and type(ours).kind in ("norm", "ffn")
    assert type(ours).__name__ == kind.__name__ and repr(ours) == repr(stock)
    assert ours.__dict__.keys() == stock.__dict__.keys()
    assert list(ours.state_dict()) == list(stock.state_dict())
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin) is modules.own_class(kind)
        assert torch.equal(twin(*inputs), stock(*inputs))
    ours.__class__ = kind
    assert torch.equal(ours(*inputs), stock(*inputs))


CALLED = [
    *((name, part) for name, parts in (
        ("GPT2MLP", ("c_fc", "act", "c_proj", "dropout")),
        ("BertIntermediate", ("dense", "intermediate_act_fn")),
        ("BertSelfOutput", ("dense", "dropout", "LayerNorm")),
        ("CLIPMLP", ("fc1", "activation_fn", "fc2")),
        ("LlamaMLP", ("gate_proj", "act_fn", "up_proj", "down_proj")),
    ) for part in parts),
]  # fmt: skip


@pytest.mark.parametrize("name, part", CALLED)
def test_hooks_of_inner_modules_are_called(name: str, part: str) -> None:
    ours, inputs, seen = _swapped(_stock(BY_NAME[name])), _inputs(name), []
    getattr(ours, part).register_forward_hook(lambda *call: seen.append(part))
    with fused_lm.use_backend("reference"):
        ours(*inputs)
    assert seen == [part]


class Doubled(nn.Linear):
    """What an adapter does: a linear of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "name, part", [case for case in CALLED if case[1] in ("dense", "fc1", "fc2", "gate_proj")]
)
def test_replaced_linears_are_called(name: str, part: str) -> None:
    stock, inputs = _stock(BY_NAME[name]), _inputs(name)
    getattr(stock, part).__class__ = Doubled
    with fused_lm.use_backend("reference"):
        torch.testing.assert_close(_swapped(stock)(*inputs), stock(*inputs))


@pytest.mark.parametrize("name", ["GPT2MLP", "BertIntermediate", "CLIPMLP", "LlamaMLP"])
def test_unknown_activations_are_left_to_the_stock_class(name: str) -> None:
    stock, inputs = _stock(BY_NAME[name]), _inputs(name)
    part = next(n for n in ("act", "act_fn", "activation_fn", "intermediate_act_fn")
                if hasattr(stock, n))  # fmt: skip
    for activation in ("quick_gelu", "gelu_10", "tanh"):
        setattr(stock, part, transformers.activations.ACT2FN[activation])
        ours = _swapped(stock)
        with fused_lm.use_backend("reference"):
            assert torch.equal(ours(*inputs), stock(*inputs))
            assert ours.likely_backend() == "pytorch"


@pytest.mark.parametrize("activation", modules.ACTIVATION_NAMES)
def test_every_activation_is_the_one_of_its_name(activation: str) -> None:
    stock = _stock(BY_NAME["BertIntermediate"])
    stock.intermediate_act_fn = transformers.activations.ACT2FN[activation]
    [x] = _inputs("BertIntermediate")
    with fused_lm.use_backend("reference"):
        ours = _swapped(stock)
        assert ours.likely_backend() == "reference"
        got = ours(x)
    check_close(got, stock(x), copy.deepcopy(stock).double()(x.double()), activation)


@pytest.mark.parametrize("backend", ["reference", *INTERPRETER])
def test_dropout_in_training_only(backend: str) -> None:
    ours = _swapped(_stock(BY_NAME["BertOutput"]))
    hidden, residual = _inputs("BertOutput")
    ours.dropout.p = 1.0
    with fused_lm.use_backend(backend):
        everything_dropped = ours.train()(hidden, residual)
        kept = ours.eval()(hidden, residual)
    torch.testing.assert_close(everything_dropped, ours.LayerNorm(residual))
    torch.testing.assert_close(kept, ours.stock.forward(ours, hidden, residual))
    network = _swapped(_stock(BY_NAME["GPT2MLP"])).train()
    with fused_lm.use_backend(backend):
        zeros = (network(torch.randn(8, 8, C)) == 0).float().mean()
    assert 0.4 < zeros < 0.6


@pytest.mark.parametrize("norm", [nn.LayerNorm, fused_lm.nn.LayerNorm])
def test_the_norm_may_be_ours(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _swapped(_stock(BY_NAME["BertSelfOutput"]))
    ours.LayerNorm.__class__ = norm
    inputs, calls = _inputs("BertSelfOutput"), []
    expected = ours(*inputs)
    monkeypatch.setattr(norm, "forward", lambda *args: calls.append(args))
    with fused_lm.use_backend("reference"):
        torch.testing.assert_close(ours(*inputs), expected)
    assert not calls


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_dtypes_of_norms(weights: torch.dtype, x: torch.dtype) -> None:
    norm = _stock(BY_NAME["LlamaRMSNorm"]).to(weights)
    hidden = torch.randn(B, T, C, dtype=x)
    with fused_lm.use_backend("reference"):
        got = _swapped(norm)(hidden)
    exact = copy.deepcopy(norm).double()(hidden.double())
    check_close(got, norm(hidden), exact)
    branch = _stock(BY_NAME["BertOutput"])
    branch.dense.to(x)
    hidden, residual = (t.to(d) for t, d in zip(_inputs("BertOutput"), (x, weights), strict=True))
    branch.LayerNorm.to(torch.promote_types(x, weights))
    with fused_lm.use_backend("reference"):
        got = _swapped(branch)(hidden, residual)
    assert got.dtype == branch(hidden, residual).dtype
