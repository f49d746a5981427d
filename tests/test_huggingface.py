"""transformers' models on our attention and drop-ins, against their own ``eager``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface

import fused_lm
from fused_lm.integrations import huggingface as hf
from fused_lm.integrations import huggingface_switch as switch
from fused_lm.tolerance import check_close
from tests.gpu import INTERPRETER, needs_interpreter
from tests.test_huggingface_calls import HAS_NOTES, captured

pytestmark = pytest.mark.usefixtures("one_thread")

V, C, LAYERS, HEADS, B, T = 50, 32, 2, 4, 3, 9
WIDTHS: dict[str, Any] = {
    "hidden_size": C, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    # Wide enough that scores differ: nearly uniform attention would hide a wrong scale.
    "intermediate_size": 48, "initializer_range": 0.25,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
TEXT = {**WIDTHS, **SPECIAL, "vocab_size": V, "max_position_embeddings": 32}
GPT2 = {**SPECIAL, "vocab_size": V, "n_embd": C, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": 32, "initializer_range": 0.25}  # fmt: skip
IMAGE = {**WIDTHS, "image_size": 12, "patch_size": 4}
T5 = {"vocab_size": V, "d_model": C, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    # A window of 4, shorter than T.
    "mistral": ("MistralForCausalLM", "MistralConfig",
                {**TEXT, "num_key_value_heads": 2, "sliding_window": 4}),
    # Softcap, a scale of its own, windows in every second layer.
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
                "attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 3}),
    "bert": ("BertModel", "BertConfig", TEXT),
    "vit": ("ViTModel", "ViTConfig", IMAGE),
    # Scores without a scale and with a bias of positions; cross-attention.
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {**T5, **SPECIAL, "decoder_start_token_id": 0}),
}  # fmt: skip
KINDS = {name: getattr(transformers, kind) for name, (kind, *_) in MODELS.items()}
OLD = [name for name, kind in KINDS.items() if not kind._can_set_attn_implementation()]
"""Models that have their attention written out: in transformers 4 BERT, for longer T5."""


def _model(name: str) -> Any:
    _, config, fields = MODELS[name]
    settings = getattr(transformers, config)(**fields, attn_implementation="eager")
    return KINDS[name](settings).eval()


def _inputs(name: str, padding: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(B, 3, 12, 12)}
    inputs = {"input_ids": torch.randint(1, V, (B, T))}
    if padding != "none":
        lengths = torch.tensor([[T], [4], [1]])
        at = torch.arange(T)
        shown = at >= T - lengths if padding == "left" else at < lengths
        inputs["attention_mask"] = shown.long()
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, V, (B, 5))
    return inputs


def _results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs where there is a token, and the gradient of every parameter by their sum."""
    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    out = model(**inputs)[0]
    shown = inputs.get("attention_mask")
    out = out if shown is None or out.shape[1] != T else out[shown.bool()]
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype).cos()
    named = dict(model.named_parameters())
    total = (out * weights).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    # A key's bias shifts all scores of a row: its gradient is 0, what is computed is noise.
    found = {
        n: g
        for n, g in zip(named, gradients, strict=True)
        if g is not None and not n.endswith(("key.bias", "k_proj.bias"))
    }
    return {"output": out.detach(), **found}


def _plain_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    """The formula. Eager gives NaN in fp64 where a row hides every key, and then everywhere."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * kw.get("scaling", q.shape[-1] ** -0.5)
    if kw.get("softcap"):
        scores = kw["softcap"] * (scores / kw["softcap"]).tanh()
    if kw.get("position_bias") is not None:
        scores = scores + kw["position_bias"]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif module.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("plain", _plain_attention)
AttentionMaskInterface.register("plain", AttentionMaskInterface()["sdpa"])


@functools.cache
def _eager(name: str, padding: str) -> tuple[Any, dict[str, Tensor], Any, Any]:
    """(model, inputs, results of eager in fp32, in fp64)."""
    torch.manual_seed(len(name) + len(padding))
    model, inputs = _model(name), _inputs(name, padding)
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation("plain")
    eager, exact = _results(model, inputs), _results(plain, inputs)
    for key in exact:
        torch.testing.assert_close(eager[key].double(), exact[key], rtol=1e-4, atol=1e-4)
    return model, inputs, eager, exact


def _check(model: Any, inputs: dict[str, Tensor], same_dtype: Any, exact: Any) -> None:
    """Errors in units of each tensor's largest number: through a model they are those of all."""
    got = _results(model, inputs)
    assert got.keys() == exact.keys()
    scales = {key: t.abs().max().item() for key, t in exact.items()}
    joined = [
        torch.cat([results[key].flatten() / scales[key] for key in exact])
        for results in (got, same_dtype, exact)
    ]
    check_close(*joined, " ".join(exact))


def _fused(model: Any) -> Any:
    """A copy on our attention."""
    model = copy.deepcopy(model)
    found = switch.use_fused_attention(model)
    assert found.changed and not found.left
    return model


CASES = [
    (name, padding, backend)
    for name in MODELS
    if name not in OLD
    for padding in (("none",) if name == "vit" else ("none", "left", "right"))
    for backend in (("auto", "reference") if padding == "left" or name == "vit" else ("reference",))
]


@pytest.mark.parametrize("name, padding, backend", CASES)
def test_attention_is_that_of_eager(name: str, padding: str, backend: str) -> None:
    model, *rest = _eager(name, padding)
    with fused_lm.use_backend(backend):
        _check(_fused(model), *rest)


@needs_interpreter
@pytest.mark.parametrize("name, padding", [("gpt2", "left"), ("gemma2", "right")])
def test_attention_by_the_kernels_is_that_of_eager(name: str, padding: str) -> None:
    model, *rest = _eager(name, padding)
    with fused_lm.use_backend("triton"):
        _check(_fused(model), *rest)


@pytest.mark.parametrize(
    "padding, backend", [("left", "auto"), ("none", "reference"), ("left", "reference")]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_greedy_generation_with_a_cache(name: str, padding: str, backend: str) -> None:
    model, inputs, *_ = _eager(name, padding)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with fused_lm.use_backend(backend):
        assert torch.equal(_fused(model).generate(**inputs, **options), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_static_cache(backend: str) -> None:
    """The first call has more keys than tokens, and the masks of 4.57 more columns than keys."""
    model, inputs, *_ = _eager("llama", "left")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    for batch in (inputs, {"input_ids": inputs["input_ids"]}):
        expected = model.generate(**batch, **options)
        with fused_lm.use_backend(backend):
            assert torch.equal(_fused(model).generate(**batch, **options), expected)


@pytest.mark.parametrize(
    "padding, backend",
    [
        ("none", "auto"),
        ("left", "auto"),
        ("left", "reference"),
        *(("left", backend) for backend in INTERPRETER),
    ],
)
def test_prefill_in_chunks(padding: str, backend: str) -> None:
    model, inputs, *_ = _eager("llama", padding)
    fused, ids, shown = _fused(model), inputs["input_ids"], inputs.get("attention_mask")
    whole, parts, cache = model(**inputs).logits, [], None
    with fused_lm.use_backend(backend), torch.no_grad():
        for start, end in ((0, 3), (3, 8), (8, T)):
            mask = None if shown is None else shown[:, :end]
            result = fused(
                ids[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True,
                position_ids=torch.arange(start, end)[None],
            )  # fmt: skip
            cache = result.past_key_values
            parts.append(result.logits)
    real = torch.ones(B, T, dtype=torch.bool) if shown is None else shown.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])


@needs_interpreter
@pytest.mark.skipif(not HAS_NOTES, reason="masks aren't told where the queries start")
def test_kernels_get_padding_and_causality_and_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch)
    for name, causal in (("gpt2", "bottom_right"), ("bert", False)):
        model, inputs, *_ = _eager(name, "right")
        for backend in ("triton", "auto"):
            calls.clear()
            with fused_lm.use_backend(backend), torch.no_grad():
                _fused(model)(**inputs)
            assert len(calls) == LAYERS
            for call in calls:
                assert ("mask" in call) == (backend == "auto")
                if backend == "triton":
                    assert call["causal"] == causal and call["key_mask"].shape == (B, T)


@pytest.mark.filterwarnings("ignore:.*output_attentions=True")
def test_a_model_returns_its_weights() -> None:
    model, inputs, *_ = _eager("llama", "right")
    expected = model(**inputs, output_attentions=True).attentions
    got = _fused(model)(**inputs, output_attentions=True).attentions
    assert len(got) == len(expected) == LAYERS
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_switching_is_undone_exactly_and_harmless_twice() -> None:
    model = _model("llama")
    model.set_attn_implementation("sdpa")
    wrapped = nn.ModuleDict({"inner": model})
    first, second = switch.use_fused_attention(wrapped), switch.use_fused_attention(wrapped)
    assert first.changed["inner"] == "sdpa" and not second.changed
    assert model.config._attn_implementation == hf.NAME
    assert switch.leave_fused_attention(copy.deepcopy(wrapped).modules()) == len(first.changed)
    assert switch.leave_fused_attention(wrapped.modules()) == len(first.changed)
    assert model.config._attn_implementation == "sdpa"
    assert switch.leave_fused_attention(wrapped.modules()) == 0


def _clip() -> Any:
    text = {**TEXT, "hidden_size": 32, "projection_dim": 16}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**IMAGE, "projection_dim": 16}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    return model


def test_composite_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _clip()
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [config._attn_implementation for config in configs]
    assert before == ["sdpa", "eager", "sdpa"]
    switch.use_fused_attention(model)
    assert [config._attn_implementation for config in configs] == [hf.NAME] * 3
    switch.leave_fused_attention(model.modules())
    assert [config._attn_implementation for config in configs] == before
    vision = type(model.vision_model)
    if not issubclass(vision, transformers.PreTrainedModel):
        return  # there is nothing of its own to refuse
    monkeypatch.setattr(vision, "_supports_sdpa", False)
    found = switch.use_fused_attention(model)
    assert vision.__name__ in found.left["vision_model"]
    assert [c._attn_implementation for c in configs] == [hf.NAME, hf.NAME, "sdpa"]


def test_what_cant_be_switched_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("gpt2")
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "_supports_sdpa", False)
    monkeypatch.setattr(transformers.GPT2Model, "_supports_sdpa", False)
    found = switch.use_fused_attention(model)
    assert not found.changed and "no sdpa" in found.left[""]
    assert model.config._attn_implementation == "eager"
    assert switch.use_fused_attention(nn.Linear(2, 2)) == ({}, {})
    for name in OLD:
        found = switch.use_fused_attention(_model(name))
        assert not found.changed and "written out" in found.left[""]
    model = _model("llama")
    model.config.output_attentions = True
    assert "asks for attention weights" in switch.use_fused_attention(model).left[""]
