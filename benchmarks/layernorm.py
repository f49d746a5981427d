"""LayerNorm and RMSNorm, forward and backward, alone and with the residual add before them:
``python -m benchmarks.layernorm --out DIR``. How it is measured: :mod:`benchmarks.harness`.

Bytes are each tensor's, once: a forward reads x and writes y, with a residual it reads that and
writes the stream as well; a backward reads dy and the stream, and writes dx, which is the
residual's gradient too. Rows are as many as make 128 MB of x, at most 64k.
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

EPS = 1e-5
WIDTHS = (768, 1024, 1600, 2048, 4096, 8192, 256, 512, 16384)
X_BYTES, MOST_ROWS = 128 << 20, 65536
FLOPS = 8.0
"""Of an element and pass, about; bytes bind a norm."""


@dataclass(frozen=True)
class Case:
    """One norm of [rows, width]."""

    width: int
    rms: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.bfloat16
    rows: int = 0

    @property
    def name(self) -> str:
        kind = "rms" if self.rms else "layer"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind}{'+residual' if self.residual else ''} c{self.width} {dtype}"

    @property
    def N(self) -> int:
        return self.rows or min(MOST_ROWS, X_BYTES // (self.width * self.dtype.itemsize))

    def given(self, device: torch.device) -> Given:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=self.dtype)

        x = randn(self.N, self.width)
        residual = randn(self.N, self.width) if self.residual else None
        weight = 1 + 0.1 * randn(self.width)
        bias = None if self.rms else randn(self.width)
        values = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        leaves = [t.requires_grad_() for t in values.values() if t is not None]
        dout = randn(self.N, self.width)
        exact = self._exact(values, dout)
        return Given(values, leaves, dout, lambda got: contest.relative_error(got, exact))

    def _exact(self, values: dict[str, Tensor | None], dout: Tensor) -> list[Tensor]:
        """fp64's output and gradients."""
        wide = {
            name: None if t is None else t.detach().double().requires_grad_()
            for name, t in values.items()
        }
        out, _ = formula(self, wide)
        leaves = [t for t in wide.values() if t is not None]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]

    def work(self) -> dict[str, Work]:
        elements = float(self.N * self.width)
        size = elements * self.dtype.itemsize
        forward = size * (4 if self.residual else 2)
        return {"fwd": Work(FLOPS * elements, forward), "bwd": Work(FLOPS * elements, 3 * size)}


def grid(dry: bool) -> list[Case]:
    """In order of worth; on a CPU a few tiny ones."""
    kinds = [(False, True), (True, True), (False, False), (True, False)]
    if dry:
        return [Case(48, rms, residual, rows=8) for rms, residual in kinds]
    cases = [Case(width, rms, residual) for rms, residual in kinds for width in WIDTHS]
    return [*cases, Case(1024, dtype=torch.float32), Case(1024, dtype=torch.float16)]


def ours(backend: str, case: Case, values: dict[str, Any]) -> Run:
    arguments = {name: t for name, t in values.items() if not (case.rms and name == "bias")}
    arguments |= {"eps": EPS, "return_residual": True}
    return contest.ours("rms_norm" if case.rms else "layer_norm", backend, arguments)


def formula(case: Case, values: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """In eager PyTorch, of whatever dtype: y, and the stream that the next layer reads. Here nobody
    gives that a gradient: detached, its backward needs none.
    """
    x, residual, weight, bias = values["x"], values["residual"], values["weight"], values["bias"]
    assert x is not None
    stream = x if residual is None else x + residual
    if case.rms:
        return F.rms_norm(stream, (case.width,), weight, EPS), stream.detach()
    return F.layer_norm(stream, (case.width,), weight, bias, EPS), stream.detach()


def liger(case: Case, values: dict[str, Any]) -> Run:
    """With a residual its RMSNorm's backward reads a gradient of the stream too, zeros here."""
    x, residual, weight, bias = values.values()
    if not case.rms:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        norm = LigerLayerNormFunction.apply
        return lambda: norm(x if residual is None else x + residual, weight, bias, EPS)
    if residual is not None:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        add_norm = LigerFusedAddRMSNormFunction.apply
        return lambda: add_norm(x, residual, weight, EPS, 0.0, "llama", False)[0]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    rms_norm = LigerRMSNormFunction.apply
    return lambda: rms_norm(x, weight, EPS, 0.0, "llama", False)


def quack(case: Case, values: dict[str, Any]) -> Run:
    from quack import rmsnorm

    if not case.rms:
        raise ValueError("quack's LayerNorm has no backward")
    x, residual, weight, _ = values.values()
    if residual is None:
        return lambda: rmsnorm(x, weight, eps=EPS)
    return lambda: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)[0]


def transformer_engine(case: Case, values: dict[str, Any]) -> Run:
    from transformer_engine.pytorch import LayerNorm, RMSNorm

    x, residual, weight, bias = values.values()
    module = (RMSNorm if case.rms else LayerNorm)(case.width, EPS, dtype=case.dtype)
    return _module(module, x, residual, weight, bias)


def apex(case: Case, values: dict[str, Any]) -> Run:
    from apex.normalization import FusedLayerNorm, FusedRMSNorm

    x, residual, weight, bias = values.values()
    module = (FusedRMSNorm if case.rms else FusedLayerNorm)(case.width, EPS)
    return _module(module, x, residual, weight, bias)


def _module(
    module: torch.nn.Module, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Run:
    """A module on our own weights, which are the leaves that gradients are asked of."""
    weights = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def run() -> Tensor:
        stream = x if residual is None else x + residual
        out: Tensor = torch.func.functional_call(module, weights, (stream,))
        return out

    return run


CONTESTANTS = [
    Contestant("cuda", partial(ours, "cuda")),
    Contestant("triton", partial(ours, "triton"), compiles=True),
    contest.eager(formula),
    contest.compiled(formula),
    Contestant("liger", liger, compiles=True),
    Contestant("quack", quack, compiles=True),
    Contestant("transformer-engine", transformer_engine),
    Contestant("apex", apex),
]

if __name__ == "__main__":
    command.main("layernorm", grid, CONTESTANTS, "tbps")
