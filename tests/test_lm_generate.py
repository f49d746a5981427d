"""The key/value cache and sampling against reading everything each time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fused_lm
from fused_lm.lm import KVCache, LayerCache, generate
from fused_lm.lm.generate import probabilities
from fused_lm.tolerance import check_close
from tests.plain_gpt import (
    POSITIONS,
    TINY,
    B,
    T,
    plain_logits,
    random_tokens,
    tiny,
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_logits_equal_uncached(
    positions: str, num_kv_heads: int | None, backend: str
) -> None:
    model = tiny(positions=positions, num_kv_heads=num_kv_heads).eval()
    tokens = random_tokens(B, T)
    pieces = tokens.split((3, 1, 1, 4), dim=1)
    with fused_lm.use_backend(backend), torch.no_grad():
        cache = model.new_cache()
        cached = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
        plain = model(tokens)
    assert cache.length == T
    params = {name: p.detach() for name, p in model.named_parameters()}
    exact = plain_logits({n: p.double() for n, p in params.items()}, tokens, model.config)
    check_close(cached, plain, exact, "cached logits")


def test_cache_refuses_what_it_cannot_hold() -> None:
    model = tiny()
    with torch.no_grad():
        cache = model.new_cache()
        model(random_tokens(2, 10), cache=cache)
        with pytest.raises(
            ValueError, match=r"the context is 12 tokens, got 3 after 10 cached ones"
        ):
            model(random_tokens(2, 3), cache=cache)
        with pytest.raises(ValueError, match=r"the cache was begun with keys .* = \[2, 4, 12, 4\]"):
            model(random_tokens(3, 1), cache=cache)
        cache.reset()
        assert cache.length == 0
        assert model(random_tokens(3, 12), cache=cache).shape == (3, 12, 11)
    with pytest.raises(
        RuntimeError, match=r"carries no gradients: call the model under torch.no_grad"
    ):
        model(random_tokens(2, 3), cache=model.new_cache())
    layer = LayerCache(4)
    with pytest.raises(ValueError, match=r"holds 0 of 4 tokens, no room for 5 more"):
        layer.append(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))


def test_cache_keeps_its_buffers_and_returns_views() -> None:
    layer = LayerCache(8)
    k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 6)
    first, _ = layer.append(k, v)
    keys, values = layer.append(k[:, :, :1], v[:, :, :1])
    assert keys.data_ptr() == first.data_ptr()
    assert torch.equal(keys, torch.cat((k, k[:, :, :1]), dim=2))
    assert torch.equal(values, torch.cat((v, v[:, :, :1]), dim=2))
    layer.reset()
    assert layer.append(k, v)[0].data_ptr() == first.data_ptr()
    assert KVCache(0, 8).length == 0


def test_generation_equals_reading_everything_each_time() -> None:
    """Greedy, past the context: the rule of the docstring, without a cache."""
    model = tiny(positions="rotary")
    context, prompt = TINY.context, random_tokens(B, 5)
    got = generate(model, prompt, 3 * context, temperature=0)
    tokens, seen = prompt, 5
    with torch.no_grad():
        for _ in range(3 * context):
            seen = context // 2 if seen > context else seen
            logits = model(tokens[:, -seen:])[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
            seen += 1
    assert torch.equal(got, tokens)


def test_generation_reads_the_end_of_a_long_prompt() -> None:
    model, prompt = tiny(), random_tokens(B, 40)
    got = generate(model, prompt, 1, temperature=0)
    with torch.no_grad():
        wanted = model(prompt[:, -12:])[:, -1].argmax(-1)
    assert torch.equal(got[:, :-1], prompt)
    assert torch.equal(got[:, -1], wanted)


def test_generation_with_the_smallest_context() -> None:
    model = tiny(context=1)
    assert generate(model, random_tokens(1, 1), 5).shape == (1, 6)
    assert generate(model, random_tokens(2, 1), 0).shape == (2, 1)


def test_samples_repeat_with_their_generator_and_keep_the_dtype() -> None:
    model, prompt = tiny(), random_tokens(B, 3).to(torch.int32)
    first, second, other = (
        generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.dtype == torch.int32
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_narrow_sampling_is_greedy() -> None:
    model, prompt = tiny(), random_tokens(B, 3)
    greedy = generate(model, prompt, 8, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}):
        assert torch.equal(generate(model, prompt, 8, **options), greedy)
    assert generate(model, prompt, 8, top_k=1000, top_p=1.0).shape == greedy.shape


def test_sampling_follows_the_cut_softmax() -> None:
    """20 000 next tokens at once: each frequency within five standard deviations."""
    model, count = tiny().eval(), 20_000
    prompt = random_tokens(1, 4)
    with torch.no_grad():
        logits = model(prompt)[0, -1].double() / 0.7
    kept = logits.masked_fill(logits < logits.topk(6).values[-1], float("-inf")).softmax(-1)
    order = kept.argsort(descending=True)
    before = kept[order].cumsum(0) - kept[order]
    kept[order[before >= 0.9]] = 0.0
    expected = kept / kept.sum()
    got = generate(model, prompt.expand(count, 4), 1, temperature=0.7, top_k=6, top_p=0.9)
    frequency = got[:, -1].bincount(minlength=TINY.vocab_size).double() / count
    assert torch.equal(frequency > 0, expected > 0)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_k_and_top_p_keep_the_exact_distribution(temperature: float) -> None:
    logits = torch.randn(20, 11)
    for row, got in zip(logits, probabilities(logits, temperature), strict=True):
        weights = [math.exp(float(x) / temperature) for x in row]
        exact = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
    for top_k in (1, 4, 11, 50):
        for top_p in (1e-9, 0.3, 0.9, 1.0):
            kept = probabilities(logits, temperature, top_k, top_p)
            for row, got in zip(probabilities(logits, temperature, top_k), kept, strict=True):
                assert int((row > 0).sum()) == min(top_k, 11)
                chosen = got > 0
                count = int(chosen.sum())
                likeliest = row.sort(descending=True).values
                mass = float(row[chosen].sum())
                assert mass == pytest.approx(float(likeliest[:count].sum()), rel=1e-12)
                assert mass >= top_p - 1e-12
                assert float(likeliest[: count - 1].sum()) < top_p, "one token fewer has less"
                torch.testing.assert_close(got[chosen], row[chosen] / mass, rtol=1e-12, atol=0)


def test_equally_likely_tokens_are_cut_by_number() -> None:
    even = torch.zeros(1, 8)
    assert probabilities(even, 1.0, top_k=3)[0].nonzero().flatten().tolist() == [0, 1, 2]
    for top_p, count in ((0.125, 1), (0.126, 2), (0.25, 2), (0.5, 4), (0.999, 8)):
        assert int((probabilities(even, 1.0, top_p=top_p) > 0).sum()) == count
    tiny_tail = torch.tensor([[0.0, -80.0]])
    assert int((probabilities(tiny_tail, 1.0, top_p=1.0) > 0).sum()) == 2


def test_generation_stops_when_told() -> None:
    model, prompt = tiny(), random_tokens(B, 3)
    whole = generate(model, prompt, 8, temperature=0)
    seen: list[torch.Tensor] = []

    def third(column: torch.Tensor) -> bool:
        seen.append(column)
        return len(seen) == 3

    assert torch.equal(generate(model, prompt, 8, temperature=0, stop=third), whole[:, :6])
    assert torch.equal(torch.cat(seen, dim=1), whole[:, 3:6])


def test_generation_restores_every_mode_also_after_an_error() -> None:
    model = tiny(dropout=0.5)
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    greedy = [generate(model, random_tokens(1, 3).zero_(), 4, temperature=0) for _ in range(2)]
    assert torch.equal(*greedy)
    with pytest.raises(ValueError, match=r"tokens must be in 0 .. 10"):
        generate(model, torch.full((1, 2), 11), 4)
    assert [module.training for module in model.modules()] == modes


BAD_SAMPLING = [
    ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"at least one token, got shape \[1, 0\]"),
    ({"max_new_tokens": -1}, r"max_new_tokens must be an integer of at least 0, got -1"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens must be an integer of at least 0, got 2.5"),
    ({"temperature": -1.0}, r"temperature must be finite and at least 0, got -1.0"),
    ({"temperature": float("nan")}, r"temperature must be finite and at least 0, got nan"),
    ({"top_k": 0}, r"top_k must be at least 1, got 0"),
    ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1.5"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SAMPLING)
def test_wrong_sampling_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"tokens": torch.zeros(1, 2, dtype=torch.long), "max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **arguments)
