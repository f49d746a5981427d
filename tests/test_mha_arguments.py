"""Every argument of nn.MultiheadAttention is heeded: a module that ignores one is caught."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fused_lm
from fused_lm import records
from fused_lm.nn import MultiheadAttention
from tests import taken
from tests.mha_cases import Case, compare, compare_modules, inputs, modules

CPU = torch.device("cpu")
PLAIN = Case(need_weights=False)
CASES = {
    "plain": PLAIN,
    "self": replace(PLAIN, same="qkv").normal(),
    "keys and values of other widths": replace(PLAIN, kdim=6, vdim=10),
    "weights": Case(),
    "weights per head": Case(average=False),
    "boolean mask": replace(PLAIN, mask="bool"),
    "mask per head": replace(PLAIN, mask="float 3d"),
    "padding": replace(PLAIN, padding="bool"),
    "float padding": replace(PLAIN, padding="float"),
    "both masks": Case(mask="bool", padding="bool"),
    "a wrong hint": replace(PLAIN, mask="float -inf", is_causal=True, S=5),
    "a wrong hint and padding": replace(PLAIN, mask="bool", is_causal=True, padding="bool"),
    "a right hint and padding": replace(
        PLAIN, mask="causal bool", is_causal=True, padding="bool", S=5
    ),
    "a right hint and weights": Case(mask="causal bool", is_causal=True, padding="float -inf"),
    "a right hint and extra keys": replace(
        PLAIN, mask="causal bool", is_causal=True, padding="bool", add_bias_kv=True
    ),
    "a wrong hint and weights": Case(mask="float", is_causal=True),
    "no bias": replace(PLAIN, bias=False),
    "learned keys": replace(PLAIN, add_bias_kv=True, mask="bool", padding="bool"),
    "zero key": replace(PLAIN, add_zero_attn=True, mask="float"),
    "both extra keys": Case(add_zero_attn=True, add_bias_kv=True, padding="float"),
    "sequence first": replace(PLAIN, batch_first=False),
    "unbatched": Case(N=None, mask="float 3d", padding="bool"),
    "rows without a key": Case(mask="bool", padding="all of one", hides_rows=True),
    "inference": replace(PLAIN, same="qkv", padding="bool", training=False, grad=False).normal(),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_each_case(name: str, backend: str, device: torch.device) -> None:
    with taken.choices() as made:
        compare(CASES[name], backend, device)
    assert backend == "auto" or backend in {chosen for _, chosen in made}


FORWARD = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


@pytest.mark.parametrize("argument", FORWARD)
def test_an_argument_of_forward_that_is_ignored_is_caught(argument: str) -> None:
    """The module behaves as if the argument had its default, for a tensor another's value."""
    others = {"query": "key", "key": "value", "value": "key"}
    signature = inspect.signature(MultiheadAttention.forward)

    class Forgetful(MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            default = signature.parameters[argument].default
            other = others.get(argument)
            bound.arguments[argument] = default if other is None else bound.arguments[other]
            return super().forward(*bound.args[1:])

    assert _caught(lambda ours, case: _as(Forgetful, ours)), argument


CONSTRUCTOR = {
    "num_heads": {"num_heads": 1, "head_dim": 16},
    "bias": {"in_proj_bias": None},
    "add_bias_kv": {"bias_k": None, "bias_v": None},
    "add_zero_attn": {"add_zero_attn": False},
    "kdim": {"kdim": 16},
    "vdim": {"vdim": 16},
    "batch_first": {"batch_first": True},
}
"""Argument -> what a module that has forgotten it holds."""


@pytest.mark.parametrize("argument", CONSTRUCTOR)
def test_an_argument_of_the_constructor_that_is_ignored_is_caught(argument: str) -> None:
    def forget(ours: Any, case: Case) -> Any:
        for name, value in CONSTRUCTOR[argument].items():
            setattr(ours, name, value)
        return ours

    assert _caught(forget), argument


def test_dropout_is_heeded() -> None:
    _, ours = modules(Case(dropout=1.0), CPU)
    x = torch.randn(2, 5, 16)
    with fused_lm.use_backend("reference"):
        torch.testing.assert_close(ours(x, x, x)[0], ours.out_proj.bias.expand(2, 5, 16))
        assert not torch.allclose(ours.eval()(x, x, x)[0], ours.out_proj.bias.expand(2, 5, 16))


def test_device_and_dtype_are_heeded() -> None:
    ours = MultiheadAttention(16, 2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.float16)}
    for wrong in ((0, 2), (16, 0), (16, 3)):
        with pytest.raises((ValueError, AssertionError)) as wanted:
            nn.MultiheadAttention(*wrong)
        with pytest.raises(wanted.type) as got:
            MultiheadAttention(*wrong)
        assert str(got.value) == str(wanted.value)


def test_the_signatures_are_torchs() -> None:
    """But for strict_nan, by keyword only."""
    for name in ("__init__", "forward"):
        stock = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = dict(inspect.signature(getattr(MultiheadAttention, name)).parameters)
        ours.pop("strict_nan", None)
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in stock.values()
        ]


def _as(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    module.__class__ = cls
    return module


def _caught(mutate: Any) -> bool:
    """Whether any case tells the mutated module from torch's, on the fused path."""
    for case in CASES.values():
        stock, ours = modules(case, CPU)
        try:
            with taken.choices() as made:
                compare_modules(stock, mutate(ours, case), case, "reference", CPU)
        except Exception:
            return True
        if not made:  # what doesn't look right is left to torch, which hides the mistake
            return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_auto_asks_about_the_call_that_would_run(name: str) -> None:
    """What records are looked up for, before anything is projected, is what dispatch sees later."""
    case = CASES[name]
    _, ours = modules(case, CPU)
    tensors, arguments = inputs(case, CPU)
    asked: list[tuple[str, Any]] = []

    def choose(op: str, call: Any) -> str:
        asked.append((op, call))
        return "reference" if len(asked) > half else "triton"

    half = 2 if case.need_weights else 1
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(case.grad):
        patch.setattr("fused_lm.dispatch.choose", choose)
        patch.setattr("fused_lm.nn.attention.stays_stock", lambda x: False)
        ours(*tensors, **arguments)
    assert len(asked) == 2 * half
    for (op, before), (later_op, later) in zip(asked[:half], asked[half:], strict=True):
        assert op == later_op
        assert records.shape_class(op, before) == records.shape_class(op, later)
        for field in ("q", "k", "mask", "key_mask", "bias"):
            one, other = getattr(before, field), getattr(later, field)
            assert (one is None) == (other is None), field
            if one is not None:
                assert (one.dtype, one.device) == (other.dtype, other.device), field
            if field in ("q", "k"):
                assert one.shape == other.shape
        assert before._replace(**_TENSORS[op])[4:] == later._replace(**_TENSORS[op])[4:]
        needs = [
            torch.is_grad_enabled() and any(t.requires_grad for t in call if torch.is_tensor(t))
            for call in (before, later)
        ]
        assert needs[0] == needs[1]


_NOTHING = dict.fromkeys(("q", "k", "mask", "key_mask", "bias", "rng"))
_TENSORS = {
    "attention": {**_NOTHING, "v": None},
    "attention_weights": {**_NOTHING, "lse": None},
}
