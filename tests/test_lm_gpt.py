"""GPT against plain PyTorch: loss, gradients, compile, export, autocast, transforms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_lm.lm import GPT, GPTConfig, generate
from fused_lm.tolerance import check_close
from tests.plain_gpt import (
    POSITIONS,
    TINY,
    B,
    T,
    check_loss,
    functional_loss,
    plain_logits,
    random_tokens,
    tiny,
)


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_and_gradients_equal_plain_formula(
    positions: str, num_kv_heads: int | None, norm_first: bool, tie_head: bool
) -> None:
    model = tiny(
        positions=positions, num_kv_heads=num_kv_heads, norm_first=norm_first, tie_head=tie_head
    )
    tokens, targets = random_tokens(B, T), random_tokens(B, T)
    targets[0, :3] = -100

    def ours(params: dict[str, Tensor]) -> Tensor:
        return functional_loss(model, params, tokens, targets)

    check_loss(model, ours, tokens, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_every_integer_dtype_is_the_same_text(dtype: torch.dtype) -> None:
    model, tokens, targets = tiny(), random_tokens(B, T), random_tokens(B, T)
    assert torch.equal(model(tokens.to(dtype)), model(tokens))
    loss = model.loss(tokens.to(dtype), targets.to(dtype))
    assert torch.equal(loss, model.loss(tokens, targets))


@pytest.mark.parametrize("positions", POSITIONS)
def test_later_tokens_change_nothing_bitwise(positions: str) -> None:
    model = tiny(positions=positions)
    tokens = random_tokens(B, T)
    with torch.no_grad():
        before = model(tokens)
        for t in range(T - 1):
            changed = tokens.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % TINY.vocab_size
            after = model(changed)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after[:, t + 1], before[:, t + 1])


def test_tied_head_is_the_embedding_and_its_gradient_the_sum() -> None:
    tied, tokens, targets = tiny(), random_tokens(B, T), random_tokens(B, T)
    loose = GPT(dataclasses.replace(TINY, tie_head=False))
    weight = tied.state_dict()["tokens.weight"]
    loose.load_state_dict({**tied.state_dict(), "head.weight": weight})
    assert not any(name.startswith("head") for name in tied.state_dict())
    assert loose.num_parameters() - tied.num_parameters() == weight.numel()
    for model in (tied.double(), loose.double()):
        model.loss(tokens, targets).backward()
    total = loose.tokens.weight.grad + loose.head.weight.grad
    check_close(tied.tokens.weight.grad, total, total, "dE")


def test_num_parameters_of_the_default_model() -> None:
    C, F_, V, context, layers = 384, 1536, 256, 256, 6
    block = 4 * C * C + 4 * C + 2 * C * F_ + F_ + C + 4 * C
    assert GPT(GPTConfig()).num_parameters() == (V + context) * C + layers * block + 2 * C


def test_initial_weights_are_gpt2s() -> None:
    model = GPT(GPTConfig(num_layers=2, embed_dim=256, num_heads=4, tie_head=False))
    residual_std = 0.02 / math.sqrt(4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            small = "out_proj" in name or "ffn.down" in name
            wanted = residual_std if small else 0.02
            deviation = wanted / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - wanted) <= 5 * deviation, name
    tokens, targets = torch.randint(256, (2, 64)), torch.randint(256, (2, 64))
    assert abs(model.loss(tokens, targets).item() - math.log(256)) < 0.2


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_model_born_on_meta_becomes_the_same(norm: str) -> None:
    config = dataclasses.replace(TINY, norm=norm, positions="rotary")
    torch.manual_seed(3)
    direct = GPT(config)
    model = GPT(config, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    reference = GPT(config)
    reference.load_state_dict(model.state_dict())
    tokens = random_tokens(B, T)
    assert torch.equal(model(tokens), reference(tokens))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in direct.named_parameters()
    }
    assert all((p == 1).all() for n, p in model.named_parameters() if n.endswith("norm1.weight"))


def test_it_learns_a_sentence() -> None:
    model = GPT(dataclasses.replace(TINY, dropout=0.05, positions="rotary"))
    text = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        model.loss(text[None, :-1], text[None, 1:]).backward()
        optimiser.step()
    said = generate(model, text[None, :2], 10, temperature=0)
    assert said[0].tolist() == text[:12].tolist()


@pytest.mark.parametrize("positions", POSITIONS)
def test_state_dict_round_trip(positions: str) -> None:
    first, second = tiny(positions=positions), tiny(positions=positions)
    tokens = random_tokens(B, T)
    assert not torch.equal(first(tokens), second(tokens))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens), second(tokens))


@pytest.mark.parametrize("positions", POSITIONS)
def test_compiled_loss_equals_eager(positions: str) -> None:
    model, tokens, targets = tiny(positions=positions), random_tokens(B, T), random_tokens(B, T)
    torch._dynamo.reset()

    def ours(params: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(params[name])
        model.zero_grad(set_to_none=True)
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return replay(loss, gradients, list(params.values()))

    check_loss(model, ours, tokens, targets)


def replay(loss: Tensor, gradients: tuple[Tensor, ...], onto: list[Tensor]) -> Tensor:
    """A scalar with the value of ``loss`` whose backward hands ``gradients`` to ``onto``."""
    linear = sum((g * p).sum() for g, p in zip(gradients, onto, strict=True))
    return loss.detach() + linear - linear.detach()


def test_ten_lengths_compile_at_most_three_times() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny(num_layers=1, context=64)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (33, 2, 3, 8, 16, 17, 31, 32, 64, 1):
        compiled(random_tokens(B, length)).sum().backward()
    assert counter.frame_count <= 3


@pytest.mark.parametrize("positions", POSITIONS)
def test_export_with_any_length(positions: str) -> None:
    model = tiny(positions=positions).eval()
    length = torch.export.Dim("T", min=2, max=TINY.context)
    shapes = {"tokens": {1: length}}
    program = torch.export.export(model, (random_tokens(B, T),), dynamic_shapes=shapes)
    for count in (2, 7, 12):
        tokens = random_tokens(B, count)
        params = {n: p.detach().double() for n, p in model.named_parameters()}
        exact = plain_logits(params, tokens, model.config)
        check_close(program.module()(tokens), model(tokens), exact, f"exported, T = {count}")


@pytest.mark.parametrize("positions", POSITIONS)
def test_autocast_is_as_accurate_as_torchs(positions: str) -> None:
    model, tokens = tiny(positions=positions).eval(), random_tokens(B, T)
    params = {name: p.detach() for name, p in model.named_parameters()}
    exact = plain_logits({n: p.double() for n, p in params.items()}, tokens, model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stock, got = plain_logits(params, tokens, model.config), model(tokens)
        check_close(got, stock, exact, "logits")
        cache = model.new_cache()
        steps = [model(piece, cache=cache) for piece in tokens.split((4, 1, 4), dim=1)]
        check_close(torch.cat(steps, dim=1), stock, exact, "cached logits")
        assert model.loss(tokens, tokens).dtype == torch.float32
        assert generate(model, tokens, 2).shape == (B, T + 2)


def test_checkpointed_model_has_the_same_gradients_with_dropout() -> None:
    model, tokens = tiny(dropout=0.3), random_tokens(B, T)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        call(tokens).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    again = gradients(lambda t: checkpoint(model, t, use_reentrant=False))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


def test_per_sample_gradients_by_vmap_of_grad() -> None:
    model, tokens, targets = tiny(), random_tokens(3, T), random_tokens(3, T)

    def loss(params: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        return functional_loss(model, params, tokens[None], targets[None])

    params = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, tokens, targets)
    for row in range(3):
        same, exact = (
            torch.func.grad(loss)(
                {n: p.to(dtype) for n, p in params.items()}, tokens[row], targets[row]
            )
            for dtype in (torch.float32, torch.float64)
        )
        for name, value in got.items():
            check_close(value[row], same[name], exact[name], f"d{name}")


BAD_TOKENS = [
    (torch.zeros(3, dtype=torch.long), ValueError, r"tokens must be \[B, T\], got shape \[3\]"),
    (torch.zeros(1, 3), TypeError, r"tokens must be integers, got torch.float32"),
    (torch.zeros(1, 3, dtype=torch.bool), TypeError, r"tokens must be integers, got torch.bool"),
    (torch.zeros(1, 13, dtype=torch.long), ValueError, r"the context is 12 tokens, got 13"),
    (torch.full((1, 3), 11), ValueError, r"tokens must be in 0 .. 10"),
    (torch.full((1, 3), -1), ValueError, r"tokens must be in 0 .. 10"),
]


@pytest.mark.parametrize(("tokens", "error", "message"), BAD_TOKENS)
def test_wrong_tokens_are_refused(tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny()(tokens)


def test_wrong_targets_are_refused() -> None:
    model, tokens = tiny(), random_tokens(B, T)
    with pytest.raises(ValueError, match=r"the shape of tokens, \[2, 9\], got \[2, 8\]"):
        model.loss(tokens, tokens[:, 1:])
    with pytest.raises(TypeError, match=r"targets must be integers, got torch.float32"):
        model.loss(tokens, tokens.float())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no rows", "no tokens"])
def test_empty_batches(shape: tuple[int, int]) -> None:
    assert tiny()(random_tokens(*shape)).shape == (*shape, TINY.vocab_size)
