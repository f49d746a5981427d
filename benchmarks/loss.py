"""Cross entropy of logits, and of a last layer whose logits never exist whole, forward and step:
``python -m benchmarks.loss --out DIR``. How it is measured: :mod:`benchmarks.harness`.

A step is forward and backward together: kernels that make the gradient with the loss have next to
nothing left for a backward alone. Bytes of the loss alone: logits read once, in a step their
gradient written too. FLOPs of the last layer: one product forward, three in a step.
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

ROWS = 8192
VOCABULARIES = (50304, 32000, 128256)
FLOPS = 8.0
"""Of a logit and pass, about; bytes bind the loss alone."""


@dataclass(frozen=True)
class Case:
    """Rows of logits, or of ``width`` inputs of a last layer."""

    vocabulary: int
    width: int = 0
    dtype: torch.dtype = torch.bfloat16
    rows: int = ROWS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layer = f"linear c{self.width} " if self.width else ""
        return f"{layer}v{self.vocabulary} n{self.rows} {dtype}"

    def given(self, device: torch.device) -> Given:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=self.dtype)

        target = torch.randint(self.vocabulary, (self.rows,), device=device)
        target[:: self.rows // 4] = -100
        if self.width:
            weight = randn(self.vocabulary, self.width) * self.width**-0.5
            values = {"x": randn(self.rows, self.width), "weight": weight}
        else:
            values = {"logits": randn(self.rows, self.vocabulary)}
        leaves = [t.requires_grad_() for t in values.values()]
        exact = self._exact(values, target)
        dout = torch.ones((), device=device)
        values["target"] = target
        return Given(values, leaves, dout, lambda got: contest.relative_error(got, exact))

    def _exact(self, values: dict[str, Tensor], target: Tensor) -> list[Tensor]:
        """The loss and its gradients, of fp32 where fp64 would not fit: the gate is coarser."""
        wide = {name: t.detach().float().requires_grad_() for name, t in values.items()}
        loss = formula(self, {**wide, "target": target})
        gradients = torch.autograd.grad(loss, [*wide.values()])
        return [loss.detach().double(), *(t.double() for t in gradients)]

    def work(self) -> dict[str, Work]:
        logits = float(self.rows * self.vocabulary)
        size = self.dtype.itemsize
        if not self.width:
            flops = FLOPS * logits
            return {"fwd": Work(flops, logits * size), "step": Work(2 * flops, 2 * logits * size)}
        flops = 2 * logits * self.width
        given = float(self.width * (self.rows + self.vocabulary)) * size
        return {"fwd": Work(flops, given), "step": Work(3 * flops, 2 * given)}


def grid(dry: bool) -> list[Case]:
    """In order of worth; on a CPU two tiny ones."""
    if dry:
        return [Case(40, rows=16), Case(40, width=16, rows=16)]
    cases = [Case(vocabulary) for vocabulary in VOCABULARIES]
    return [*cases, *(Case(50304, width) for width in (768, 1600)), Case(128256, 4096)]


def ours(backend: str, case: Case, values: dict[str, Any]) -> Run:
    op = "linear_cross_entropy" if case.width else "cross_entropy"
    return contest.ours(op, backend, values)


def formula(case: Case, values: dict[str, Any]) -> Tensor:
    """In eager PyTorch."""
    logits = values["x"] @ values["weight"].t() if case.width else values["logits"]
    return F.cross_entropy(logits.float(), values["target"])


def liger(case: Case, values: dict[str, Any]) -> Run:
    """It overwrites the logits that it is given: a copy of them is part of its time."""
    if case.width:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        x, weight, target = values["x"], values["weight"], values["target"]
        return lambda: _loss(liger_fused_linear_cross_entropy(x, weight, target))
    from liger_kernel.transformers.functional import liger_cross_entropy

    logits, target = values["logits"], values["target"]
    return lambda: _loss(liger_cross_entropy(logits.clone(), target))


def quack(case: Case, values: dict[str, Any]) -> Run:
    if case.width:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        x, weight, target = values["x"], values["weight"], values["target"]
        return lambda: _loss(chunked_linear_cross_entropy(x, weight, target))
    from quack.cross_entropy import cross_entropy

    logits, target = values["logits"], values["target"]
    return lambda: _loss(cross_entropy(logits, target, reduction="mean"))


def _loss(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """In fp32, as the gradient that it is given."""
    return contest.first(result).float()


CONTESTANTS = [
    Contestant("cuda", partial(ours, "cuda")),
    Contestant("triton", partial(ours, "triton"), compiles=True),
    Contestant("pytorch", partial(ours, "pytorch")),
    contest.eager(formula),
    contest.compiled(formula),
    Contestant("liger", liger, compiles=True),
    Contestant("quack", quack, compiles=True),
]

if __name__ == "__main__":
    command.main("loss", grid, CONTESTANTS, "us")
