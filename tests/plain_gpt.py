"""GPT in plain PyTorch operators: the oracle of the tests of ``fused_lm.lm``."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lm.lm import GPT, GPTConfig
from fused_lm.tolerance import check_close, max_error

POSITIONS = ("learned", "sinusoidal", "rotary")
TINY = GPTConfig(vocab_size=11, context=12, num_layers=2, embed_dim=16, num_heads=4, ffn_dim=24)
B, T = 2, 9


def tiny(**changes: Any) -> GPT:
    """A small model whose every weight is of ordinary size, biases and gains too."""
    model = GPT(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2)
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(TINY.vocab_size, shape)


def angles(T: int, width: int) -> Tensor:
    frequencies = 10000.0 ** (-2 * torch.arange((width + 1) // 2, dtype=torch.float64) / width)
    return torch.arange(T, dtype=torch.float64)[:, None] * frequencies


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    """``F.scaled_dot_product_attention(is_causal=True, enable_gqa=True)`` written out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[3])
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def plain_attention(
    params: dict[str, Tensor], at: str, x: Tensor, config: GPTConfig, attend: Callable[..., Tensor]
) -> Tensor:
    D, Hkv = config.head_dim, config.num_kv_heads or config.num_heads
    qkv = F.linear(x, params[f"{at}.qkv.weight"], params[f"{at}.qkv.bias"]).unflatten(-1, (-1, D))
    q, k, v = (part.transpose(1, 2) for part in qkv.split((config.num_heads, Hkv, Hkv), dim=2))
    if config.positions == "rotary":
        turn = torch.polar(torch.ones(1, dtype=torch.float64), angles(x.shape[1], D))
        q, k = (
            torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
            for turned in (torch.complex(*y.double().chunk(2, dim=-1)) * turn for y in (q, k))
        )
    out = attend(q, k, v, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2).flatten(2)
    return F.linear(out, params[f"{at}.out_proj.weight"], params[f"{at}.out_proj.bias"])


def plain_logits(
    params: dict[str, Tensor],
    tokens: Tensor,
    config: GPTConfig,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """The model's formula in plain operators: LayerNorm, GELU, bias, any positions."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"])

    def ffn(at: str, x: Tensor) -> Tensor:
        x = F.gelu(F.linear(x, params[f"{at}.ffn.up.weight"], params[f"{at}.ffn.up.bias"]))
        return F.linear(x, params[f"{at}.ffn.down.weight"], params[f"{at}.ffn.down.bias"])

    x = F.embedding(tokens, params["tokens.weight"])
    if config.positions == "learned":
        x = x + params["positions.weight"][: tokens.shape[1]]
    if config.positions == "sinusoidal":
        turns = angles(tokens.shape[1], config.embed_dim)
        table = torch.stack((turns.sin(), turns.cos()), dim=-1).flatten(1)
        x = x * math.sqrt(config.embed_dim) + table.to(x.dtype)
    for at in (f"blocks.{layer_idx}" for layer_idx in range(config.num_layers)):
        if config.norm_first:
            x = x + plain_attention(params, at, norm(f"{at}.norm1", x), config, attend)
            x = x + ffn(at, norm(f"{at}.norm2", x))
        else:
            x = norm(f"{at}.norm1", x + plain_attention(params, at, x, config, attend))
            x = norm(f"{at}.norm2", x + ffn(at, x))
    x = norm("norm", x) if config.norm_first else x
    return F.linear(x, params.get("head.weight", params["tokens.weight"]))


def check_loss(model: GPT, ours: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> None:
    """Loss and every gradient of ``ours(params)`` against the plain formula in fp64.

    A gradient of few elements through a whole model is one draw of the rounding noise. So PyTorch's
    own error is the largest over the orders of summation that it offers: attention fused or written
    out, rows of the batch either way round.
    """

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        params = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
        value = loss(params)
        value.backward()
        return {"loss": value.detach(), **{f"d{n}": p.grad for n, p in params.items()}}

    def plain(flipped: bool, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        text, wanted = (t.flip(0) if flipped else t for t in (tokens.long(), targets.long()))

        def loss(params: dict[str, Tensor]) -> Tensor:
            logits = plain_logits(params, text, model.config, attend)
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

        return loss

    got = run(ours, torch.float32)
    exact = run(plain(False, softmax_attention), torch.float64)
    orders = itertools.product((False, True), (F.scaled_dot_product_attention, softmax_attention))
    same = [run(plain(*order), torch.float32) for order in orders]
    for name, value in got.items():
        worst = max((draw[name] for draw in same), key=lambda t: max_error(t, exact[name]))
        check_close(value, worst, exact[name], name)


def functional_loss(
    model: GPT, params: dict[str, Tensor], tokens: Tensor, targets: Tensor
) -> Tensor:
    """``model.loss`` with other parameters; functional_call reaches ``forward`` only."""

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.loss(tokens, targets)

    renamed = {f"model.{name}": value for name, value in params.items()}
    return torch.func.functional_call(Loss(), renamed, ())
