"""A whole block of a GPT, forward and step, at 16k tokens:
``python -m benchmarks.block --out DIR``. How it is measured: :mod:`benchmarks.harness`.

A step is forward and backward together. FLOPs are those of the linears and of the attention's
visible pairs, three times as many in a step. Bytes are the stream and the weights, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lm import use_backend
from fused_lm.nn import GPTBlock
from fused_lm.nn.feedforward import default_ffn_dim
from fused_lm.nn.positions import rotary_tables

from . import command, contest, ffn
from .contest import Contestant, Given, Run, Work

TOKENS = 16384
EPS = 1e-5

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One pre-norm causal block of [B, T, width]: GPT-2's, or Llama's (``llama``), whose
    ``kv_heads`` may be fewer.
    """

    width: int
    heads: int
    T: int = 1024
    llama: bool = False
    kv_heads: int = 0
    padded: bool = False
    dtype: torch.dtype = torch.bfloat16
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "llama" if self.llama else "gpt2"
        shared = f"/{self.kv_heads}" if self.kv_heads else ""
        padding = "+padding" if self.padded else ""
        return f"{kind}{padding} c{self.width} h{self.heads}{shared} t{self.T} {dtype}"

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.T)

    @property
    def activation(self) -> str:
        return "swiglu" if self.llama else "gelu_tanh"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def given(self, device: torch.device) -> Given:
        module = GPTBlock(
            self.width,
            self.heads,
            num_kv_heads=self.groups,
            activation=self.activation,
            norm="rms_norm" if self.llama else "layer_norm",
            bias=not self.llama,
            eps=EPS,
            device=device,
            dtype=self.dtype,
        )
        x, dout = (
            torch.randn(self.batch, self.T, self.width, device=device, dtype=self.dtype)
            for _ in range(2)
        )
        positions = torch.arange(self.T, device=device)
        key_mask = None
        if self.padded:
            lengths = torch.linspace(self.T // 2, self.T, self.batch, device=device).long()
            key_mask = positions < lengths[:, None]
        values: dict[str, Any] = {
            "x": x.requires_grad_(),
            "module": module,
            "weights": dict(module.named_parameters()),
            "key_mask": key_mask,
            "rotary": rotary_tables(positions, self.head_dim) if self.llama else None,
        }
        leaves = [x, *values["weights"].values()]
        exact = self._exact(values, dout)
        return Given(values, leaves, dout, lambda got: contest.relative_error(got, exact))

    def _exact(self, values: dict[str, Any], dout: Tensor) -> list[Tensor]:
        """fp32's output and gradients: the scores of fp64 would not fit."""
        x = values["x"].detach().float().requires_grad_()
        weights = {
            name: t.detach().float().requires_grad_() for name, t in values["weights"].items()
        }
        out = formula(self, {**values, "x": x, "weights": weights})
        gradients = torch.autograd.grad(out, [x, *weights.values()], dout.float())
        return [out.detach().double(), *(t.double() for t in gradients)]

    def work(self) -> dict[str, Work]:
        flops, weights = self.flops(), float(self.matrix_elements())
        rows, size = float(self.batch * self.T * self.width), self.dtype.itemsize
        return {
            "fwd": Work(flops, size * (2.0 * rows + weights)),
            "step": Work(3 * flops, size * (5.0 * rows + 3 * weights)),
        }

    def matrix_elements(self) -> int:
        """Of all linears."""
        qkv = (self.heads + 2 * self.groups) * self.head_dim * self.width
        products = 3 if self.llama else 2
        return qkv + self.width**2 + products * self.width * self.hidden

    @property
    def hidden(self) -> int:
        return default_ffn_dim(self.width, self.activation)

    def flops(self) -> float:
        """Of a forward."""
        pairs = self.batch * self.T * (self.T + 1) / 2
        linears = 2.0 * self.batch * self.T * self.matrix_elements()
        return linears + 4.0 * pairs * self.width


def grid(dry: bool) -> list[Case]:
    """GPT-2's four and two of Llama's, then with padding; on a CPU two tiny ones."""
    if dry:
        tiny = Case(32, 2, T=16, padded=True, tokens=32)
        return [tiny, replace(tiny, llama=True, kv_heads=1, padded=False)]
    gpt2 = [Case(width, heads) for width, heads in ((768, 12), (1024, 16), (1280, 20), (1600, 25))]
    llama = [Case(2048, 32, 4096, True, 8), Case(4096, 32, 4096, True, 8)]
    return [*gpt2, *llama, replace(gpt2[0], padded=True), replace(llama[0], padded=True)]


def ours(backend: str, compiled: bool, case: Case, values: dict[str, Any]) -> Run:
    module, options = values["module"], {name: values[name] for name in ("key_mask", "rotary")}
    if compiled:
        contest.check_compiles()
    call = torch.compile(module, dynamic=False) if compiled else module

    def run() -> Tensor:
        with use_backend(backend):
            out: Tensor = call(values["x"], **options)
            return out

    return run


def formula(case: Case, values: dict[str, Any]) -> Tensor:
    """In eager PyTorch, of whatever dtype."""
    visible = None
    if values["key_mask"] is not None:
        causal = torch.ones(case.T, case.T, dtype=torch.bool, device=values["x"].device).tril()
        visible = causal & values["key_mask"][:, None, None, :]
    return plain_block(case, values["x"], values["weights"], visible, values["rotary"])


def plain_block(
    case: Case,
    x: Tensor,
    weights: Weights,
    visible: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A block of PyTorch's own operators, on the weights of ours."""
    B, T, H, D = x.shape[0], x.shape[1], case.heads, case.head_dim
    qkv = F.linear(_normed(case, x, weights, "norm1"), *_linear(weights, "qkv"))
    parts = qkv.view(B, T, -1, D).split((H, case.groups, case.groups), dim=2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    if rotary is not None:
        q, k = (_turned(part, *rotary) for part in (q, k))
    attended = F.scaled_dot_product_attention(
        q, k, v, visible, is_causal=visible is None, enable_gqa=case.groups < H
    )
    attended = attended.transpose(1, 2).reshape(B, T, H * D)
    x = x + F.linear(attended, *_linear(weights, "out_proj"))
    hidden = F.linear(_normed(case, x, weights, "norm2"), *_linear(weights, "ffn.up"))
    return x + F.linear(ffn.activate(case.activation, hidden), *_linear(weights, "ffn.down"))


def _linear(weights: Weights, name: str) -> tuple[Tensor, Tensor | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def _normed(case: Case, x: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = _linear(weights, name)
    if case.llama:
        return F.rms_norm(x, (case.width,), weight, EPS)
    return F.layer_norm(x, (case.width,), weight, bias, EPS)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def stock(compiled: bool, case: Case, values: dict[str, Any]) -> Run:
    """PyTorch's own module, on the same weights."""
    if case.llama:
        raise ValueError("nn.TransformerEncoderLayer is no Llama block")
    if compiled:
        contest.check_compiles()
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(
        *(case.width, case.heads, case.hidden),
        activation=partial(F.gelu, approximate="tanh"),
        device=values["x"].device,
        dtype=case.dtype,
        **options,
    )
    weights = {STOCK_NAMES[name]: t for name, t in values["weights"].items()}
    hidden = torch.ones(case.T, case.T, dtype=torch.bool, device=values["x"].device).triu(1)
    padding = None if values["key_mask"] is None else ~values["key_mask"]

    def run(x: Tensor) -> Tensor:
        arguments = {"src_mask": hidden, "src_key_padding_mask": padding}
        out: Tensor = torch.func.functional_call(
            layer, weights, (x,), {**arguments, "is_causal": True}
        )
        return out

    call = torch.compile(run, dynamic=False) if compiled else run
    return lambda: call(values["x"])


STOCK_NAMES = {
    "qkv.weight": "self_attn.in_proj_weight",
    "qkv.bias": "self_attn.in_proj_bias",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (
            ("out_proj", "self_attn.out_proj"),
            *(("norm1", "norm1"), ("norm2", "norm2")),
            *(("ffn.up", "linear1"), ("ffn.down", "linear2")),
        )
        for kind in ("weight", "bias")
    },
}


CONTESTANTS = [
    Contestant("fused_lm", partial(ours, "auto", False), compiles=True),
    Contestant("fused_lm compiled", partial(ours, "auto", True), compiles=True),
    Contestant("triton", partial(ours, "triton", False), compiles=True),
    contest.eager(formula),
    contest.compiled(formula),
    Contestant("stock", partial(stock, False)),
    Contestant("stock compiled", partial(stock, True), compiles=True),
]

if __name__ == "__main__":
    command.main("block", grid, CONTESTANTS, "tflops")
