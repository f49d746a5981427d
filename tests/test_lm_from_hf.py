"""GPT-2's weights to and from fused_lm.lm.GPT, against transformers' own model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import fused_lm
from fused_lm.lm import GPT, GPTConfig
from fused_lm.lm.huggingface import (
    config_from_hf,
    config_of_state,
    config_to_hf,
    state_from_hf,
    state_to_hf,
)
from fused_lm.tolerance import check_close

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "vocab_size": 40, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 4,
    # Wide enough that every weight, scale and bias matters to the logits.
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def _config(**fields: Any) -> GPT2Config:
    return GPT2Config(**{**TINY, **fields})


def _gpt2(kind: type = GPT2LMHeadModel, **fields: Any) -> nn.Module:
    """In evaluation, with random biases and norms: their initial zeros and ones would hide them."""
    model = kind(_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _tokens() -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (2, 9))


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_logits_loss_and_gradients_are_gpt2s(backend: str) -> None:
    stock, tokens = _gpt2(), _tokens()
    exact = copy.deepcopy(stock).double()
    ours = GPT.from_hf(stock)
    assert not ours.training and ours.config.dropout == 0.1
    logits = [model(tokens).logits for model in (stock, exact)]
    losses = [nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
              for y in logits]  # fmt: skip
    with fused_lm.use_backend(backend):
        check_close(ours(tokens), *logits, "logits")
        loss = ours.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    check_close(loss, *losses, "loss")
    for total in losses:
        total.backward()
    gradients = [
        state_from_hf({n: p.grad for n, p in model.named_parameters()}, ours.config)
        for model in (stock, exact)
    ]
    for name, parameter in ours.named_parameters():
        check_close(parameter.grad, *(g[name] for g in gradients), name)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "relu2"])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(activation: str, tied: bool) -> None:
    stock = _gpt2(activation_function=activation, tie_word_embeddings=tied, n_inner=48)
    ours = GPT.from_hf(stock)
    twin = GPT2LMHeadModel(_config(**config_to_hf(ours.config)))
    twin.load_state_dict(ours.to_hf(), strict=True)
    tokens = _tokens()
    assert torch.equal(twin.eval()(tokens).logits, stock(tokens).logits)
    assert config_from_hf(twin.config) == ours.config == config_from_hf(stock.config.to_dict())
    again = GPT.from_hf(ours.to_hf(), ours.config)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True)
    )


def test_weights_are_copies_in_their_own_dtype() -> None:
    stock = _gpt2().bfloat16()
    kept = {name: weight.clone() for name, weight in stock.state_dict().items()}
    state = torch.get_rng_state()
    ours = GPT.from_hf(stock)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, kept[name]) for name, weight in stock.state_dict().items())


def test_state_dicts_of_every_age() -> None:
    """Without prefix, without head, with the masks that old checkpoints have as buffers."""
    stock = _gpt2(n_embd=128, n_head=2)
    config = config_from_hf(stock.config)
    expected = GPT.from_hf(stock).state_dict()
    bare = stock.transformer.state_dict()
    old = {**bare, "h.0.attn.bias": torch.ones(1, 1, 12, 12), "h.1.attn.masked_bias": torch.ones(1)}
    prefixed = {"transformer." + name: weight for name, weight in old.items()}
    for state in (bare, old, prefixed, stock.state_dict()):
        model = GPT.from_hf(state)
        assert all(torch.equal(weight, expected[name]) for name, weight in
                   model.state_dict().items())  # fmt: skip
        assert model.config == GPTConfig(**{**config.to_dict(), "ffn_dim": 512, "dropout": 0.0})
    model = _gpt2(GPT2Model)
    assert GPT.from_hf(model).config.tie_head


def test_heads_of_a_state_dict_are_64_wide_or_given() -> None:
    stock = _gpt2()
    with pytest.raises(ValueError, match="give the configuration"):
        GPT.from_hf(stock.state_dict())
    tokens = _tokens()
    for config in (stock.config, stock.config.to_dict(), config_from_hf(stock.config)):
        ours = GPT.from_hf(stock.state_dict(), config).eval()
        torch.testing.assert_close(ours(tokens), stock(tokens).logits)
    untied = _gpt2(n_embd=64, n_head=1, tie_word_embeddings=False)
    assert not config_of_state(untied.state_dict()).tie_head


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"activation_function": "tanh"}, "activation_function='tanh'"),
        ({"attn_pdrop": 0.0}, "one dropout everywhere"),
        ({"model_type": "gptj"}, "not of a gptj"),
    ],
)
def test_refuses_what_gpt_cant_represent(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf({**_config().to_dict(), **fields})


def test_precision_switch_changes_no_mathematics() -> None:
    assert config_from_hf(_config(reorder_and_upcast_attn=True)) == config_from_hf(_config())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "rms_norm"}, "norm='layer_norm'"),
        ({"norm_first": False}, "norm_first=True"),
        ({"positions": "rotary"}, "positions='learned'"),
        ({"bias": False}, "bias=True"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"activation": "swiglu"}, "swiglu"),
    ],
)
def test_refuses_what_gpt2_cant_represent(fields: dict[str, Any], message: str) -> None:
    config = GPTConfig(vocab_size=40, context=8, num_layers=1, embed_dim=32, num_heads=4, **fields)
    model = GPT(config)
    with pytest.raises(ValueError, match=message):
        model.to_hf()
    with pytest.raises(ValueError, match=message):
        state_to_hf(model.state_dict(), config)


def test_refuses_weights_that_dont_fit() -> None:
    stock = _gpt2()
    config, state = config_from_hf(stock.config), dict(stock.state_dict())
    lacking = {name: weight for name, weight in state.items() if "h.1.ln_2.bias" not in name}
    with pytest.raises(ValueError, match=r"missing h\.1\.ln_2\.bias, unknown nothing"):
        state_from_hf(lacking, config)
    with pytest.raises(ValueError, match=r"missing nothing, unknown score\.weight"):
        state_from_hf({**state, "score.weight": torch.ones(2)}, config)
    with pytest.raises(ValueError, match=r"positions\.weight must be \[12, 32\]"):
        state_from_hf({**state, "transformer.wpe.weight": torch.ones(13, 32)}, config)
    with pytest.raises(ValueError, match="isn't tied"):
        state_from_hf({**state, "lm_head.weight": torch.ones(40, 32)}, config)
    untied = config_from_hf({**stock.config.to_dict(), "tie_word_embeddings": False})
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"there is no lm_head\.weight"):
        state_from_hf(state, untied)
    with pytest.raises(ValueError, match="is no GPT-2's"):
        GPT.from_hf({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="got str"):
        GPT.from_hf("gpt2")
