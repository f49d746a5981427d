"""``fuse()`` on transformers' GPT-2, BERT, ViT and Llama: the same logits, gradients and tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fused_lm
from fused_lm.nn.dropin import DropIn
from tests import taken
from tests.gpu import needs_interpreter
from tests.test_huggingface import LAYERS, OLD, _check, _eager

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("gpt2", "bert", "vit", "llama")
CASES = [
    (name, padding, backend)
    for name in NAMES
    for padding in (("none",) if name == "vit" else ("none", "left", "right"))
    for backend in ("auto", "reference")
]


def _fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    assert fused_lm.fuse(twin).changed > 2 * LAYERS
    return twin


@pytest.mark.parametrize("name, padding, backend", CASES)
def test_logits_and_gradients(name: str, padding: str, backend: str) -> None:
    model, *rest = _eager(name, padding)
    with fused_lm.use_backend(backend), taken.choices() as made:
        _check(_fused(model), *rest)
    ops = {op for op, chosen in made if chosen == "reference"}
    norm = "rms_norm" if name == "llama" else "layer_norm"
    network = {"gpt2": "ffn", "bert": "linear_act", "vit": "ffn", "llama": "linear_act"}[name]
    attention = set() if name in OLD else {"attention"}
    if backend == "reference":
        assert ops >= attention | {norm} and (network in ops or "linear_act" in ops)


@needs_interpreter
@pytest.mark.parametrize("name, padding", [("gpt2", "left"), ("llama", "right")])
def test_logits_and_gradients_of_the_kernels(name: str, padding: str) -> None:
    model, *rest = _eager(name, padding)
    with fused_lm.use_backend("triton"):
        _check(_fused(model), *rest)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generated_tokens(name: str, padding: str, backend: str) -> None:
    model, inputs, *_ = _eager(name, padding)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with fused_lm.use_backend(backend):
        assert torch.equal(_fused(model).generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    stock = copy.deepcopy(_eager(name, "none")[0])
    model = copy.deepcopy(stock)
    report, again = fused_lm.fuse(model), fused_lm.fuse(model)
    assert again.changed == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert fused_lm.unfuse(twin) == report.changed
    with fused_lm.fused(model) as inner:
        assert inner.changed == 0
    assert model.config._attn_implementation == ("eager" if name in OLD else "fused_lm")
    assert fused_lm.unfuse(model) == report.changed
    assert not any(isinstance(m, DropIn) for m in model.modules())
    with fused_lm.fused(model):
        assert any(isinstance(m, DropIn) for m in model.modules())
    for back, module in zip(model.modules(), stock.modules(), strict=True):
        assert type(back) is type(module) and back.__dict__.keys() == module.__dict__.keys()
    assert model.config._attn_implementation == "eager"
    assert "fused_lm" not in str(model.config.to_dict())


@needs_interpreter
def test_the_report_names_attention_networks_and_norms() -> None:
    model = copy.deepcopy(_eager("llama", "none")[0])
    with fused_lm.use_backend("triton"):
        report = fused_lm.fuse(model)
    rows = {(row.path, row.was): row for row in report.rows}
    attention = rows["", "attention of LlamaForCausalLM: eager"]
    assert attention.now == "fused_lm" and attention.backend == "triton"
    assert rows["model.layers.0.mlp", "LlamaMLP"].now == "fused_lm LlamaMLP"
    assert rows["model.norm", "LlamaRMSNorm"].backend == "triton"
    assert all(row.reason == "" for row in report.rows)


def test_switches_and_what_has_no_class() -> None:
    model = copy.deepcopy(_eager("gemma2", "none")[0])
    report = fused_lm.fuse(model, attention=False, ffn=False)
    assert report.changed == 0 and model.config._attn_implementation == "eager"
    assert {row.reason.split(" for ")[0] for row in report.rows} == {"no fused class"}
    model = nn.ModuleDict({"inner": copy.deepcopy(_eager("gpt2", "none")[0])})
    report = fused_lm.fuse(model, attention=False, norm=False)
    assert report.changed == LAYERS and {row.was for row in report.rows} == {"GPT2MLP"}
