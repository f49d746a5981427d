"""The feed-forward network of a transformer block, forward and step, at 16k tokens:
``python -m benchmarks.ffn --out DIR``. How it is measured: :mod:`benchmarks.harness`.

A step is forward and backward together: some overwrite in the backward what the forward saved.
FLOPs are those of the products: two of N C F multiply-adds forward, a gated network three, and
three times as many in a step. Bytes are inputs, weights, outputs and gradients, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import command, contest
from .contest import Contestant, Given, Run, Work

TOKENS = 16384
GPT2 = {"small": 768, "medium": 1024, "large": 1280, "XL": 1600}
GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class Case:
    """``act(x W1^T + b1) W2^T + b2`` of [tokens, width]; gated ones without biases, as Llama's."""

    width: int
    hidden: int
    activation: str = "gelu_tanh"
    dtype: torch.dtype = torch.bfloat16
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.activation} c{self.width} f{self.hidden} n{self.tokens} {dtype}"

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def given(self, device: torch.device) -> Given:
        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, device=device, dtype=self.dtype)

        width, hidden = self.width, self.hidden
        values: dict[str, Any] = {
            "x": randn(self.tokens, width),
            "up_weight": randn((1 + self.gated) * hidden, width, scale=width**-0.5),
            "down_weight": randn(width, hidden, scale=hidden**-0.5),
            "up_bias": None if self.gated else randn(hidden),
            "down_bias": None if self.gated else randn(width),
        }
        leaves = [t.requires_grad_() for t in values.values() if t is not None]
        dout = randn(self.tokens, width)
        exact = self._exact(values, dout)
        return Given(values, leaves, dout, lambda got: contest.relative_error(got, exact))

    def _exact(self, values: dict[str, Any], dout: Tensor) -> list[Tensor]:
        """fp64's output and gradients."""
        wide = {
            name: None if t is None else t.detach().double().requires_grad_()
            for name, t in values.items()
        }
        out = formula(self, wide)
        leaves = [t for t in wide.values() if t is not None]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]

    def work(self) -> dict[str, Work]:
        products = 3 if self.gated else 2
        flops = 2.0 * products * self.tokens * self.width * self.hidden
        weights = products * self.width * self.hidden
        rows = self.tokens * self.width
        size = self.dtype.itemsize
        return {
            "fwd": Work(flops, size * (2.0 * rows + weights)),
            "step": Work(3 * flops, size * (5.0 * rows + 3 * weights)),
        }


def grid(dry: bool) -> list[Case]:
    """GPT-2's four, then Llama's; on a CPU two tiny ones."""
    if dry:
        return [Case(16, 32, tokens=16), Case(16, 32, "swiglu", tokens=16)]
    cases = [Case(width, 4 * width) for width in GPT2.values()]
    cases += [Case(4096, 16384), Case(4096, 14336, "swiglu"), Case(2048, 5632, "swiglu")]
    return [*cases, Case(1024, 4096, "relu"), Case(1024, 4096, dtype=torch.float16)]


def ours(backend: str, case: Case, values: dict[str, Any]) -> Run:
    return contest.ours("ffn", backend, {**values, "activation": case.activation})


def activate(activation: str, hidden: Tensor) -> Tensor:
    if activation in GATED:
        gate, value = hidden.chunk(2, -1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * value
    if activation == "relu":
        return F.relu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def formula(case: Case, values: dict[str, Any]) -> Tensor:
    """In eager PyTorch, of whatever dtype."""
    hidden = F.linear(values["x"], values["up_weight"], values["up_bias"])
    return F.linear(activate(case.activation, hidden), values["down_weight"], values["down_bias"])


def liger(case: Case, values: dict[str, Any]) -> Run:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if not case.gated:
        raise ValueError("Liger has gated networks only")
    gate, value = values["up_weight"].chunk(2)
    multiply = (LigerSiLUMulFunction if case.activation == "swiglu" else LigerGELUMulFunction).apply
    x, down = values["x"], values["down_weight"]
    return lambda: F.linear(multiply(F.linear(x, gate), F.linear(x, value)), down)


CONTESTANTS = [
    Contestant("cuda", partial(ours, "cuda")),
    Contestant("triton", partial(ours, "triton"), compiles=True),
    Contestant("pytorch", partial(ours, "pytorch")),
    contest.eager(formula),
    contest.compiled(formula),
    Contestant("liger", liger, compiles=True),
]

if __name__ == "__main__":
    command.main("ffn", grid, CONTESTANTS, "tflops")
