"""The cross-entropy cases of ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_lm
from fused_lm.pytorch import linear_cross_entropy as pytorch

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem

IGNORED = -100
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


@dataclass(frozen=True)
class CrossEntropyCase:
    """One call of ``cross_entropy`` on [N, V], or of ``linear_cross_entropy`` from width C.

    Features: label_smoothing, z_loss, softcap, sum, none, bias, chunks. PyTorch's cross entropy
    has no z-loss and no softcap: z_loss goes with softcap here.
    """

    op: str = "cross_entropy"
    features: tuple[str, ...] = ()
    N: int = 37
    V: int = 101
    C: int = 48

    @property
    def name(self) -> str:
        width = f" c{self.C}" if self.op == "linear_cross_entropy" else ""
        return f"{'+'.join(self.features) or 'plain'} n{self.N} v{self.V}{width}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        target = torch.randint(self.V, (self.N,), device=device)
        target[::5] = IGNORED
        options: dict[str, Any] = {n: v for n, v in OPTIONS.items() if n in self.features}
        reductions = [name for name in ("sum", "none") if name in self.features]
        options["reduction"] = reductions[0] if reductions else "mean"
        given = self._inputs(dtype, device)
        names = tuple(given)
        linear = self.op == "linear_cross_entropy"
        chunks: dict[str, Any] = {"chunk_rows": 10} if "chunks" in self.features else {}

        def ours(*tensors: Tensor) -> Sequence[Tensor]:
            if not linear:
                return (fused_lm.cross_entropy(tensors[0], target, **options),)
            x, weight, *bias = tensors
            more = {} if fused_lm.dispatch.current_backend() == "pytorch" else chunks
            addend = bias[0] if bias else None
            return (
                fused_lm.linear_cross_entropy(x, weight, target, bias=addend, **options, **more),
            )

        def formula_of(*tensors: Tensor) -> Sequence[Tensor]:
            return (formula(F.linear(*tensors) if linear else tensors[0], target, **options),)

        def theirs(*tensors: Tensor) -> Sequence[Tensor]:
            kernel = fused_lm.dispatch.current_backend() in ("cuda", "triton")
            if kernel or not linear or options.keys() & {"z_loss", "softcap"}:
                return ours(*tensors)
            # What a user writes has whole logits, which dispatch doesn't make of many rows.
            x, weight, *bias = tensors
            eps, reduction = options.get("label_smoothing", 0.0), options["reduction"]
            addend = bias[0] if bias else None
            return (
                pytorch.linear_cross_entropy(x, weight, addend, target, IGNORED, eps, reduction),
            )

        arguments = {**given, "target": target, **options, **chunks}
        inputs = list(given.values())
        return Problem(ours, formula_of, inputs, ("loss",), names, theirs, arguments)

    def _inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        if self.op == "cross_entropy":
            return {"logits": (torch.randn(self.N, self.V, device=device) * 3).to(dtype)}
        given = {
            "x": torch.randn(self.N, self.C, device=device).to(dtype),
            "weight": (torch.randn(self.V, self.C, device=device) * self.C**-0.5).to(dtype),
        }
        if "bias" in self.features:
            given["bias"] = torch.randn(self.V, device=device).to(dtype)
        return given


def formula(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The cross entropy of a smoothed one-hot distribution q and softmax(s), by plain autograd."""
    s = logits if logits.dtype == torch.float64 else logits.float()
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    counted = target != ignore_index
    q = F.one_hot(target.long() * counted, s.shape[-1]).to(s.dtype)
    q = (1 - label_smoothing) * q + label_smoothing / s.shape[-1]
    loss = -(q * torch.log_softmax(s, -1)).sum(-1) + z_loss * torch.logsumexp(s, -1).square()
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()


SMALL_CROSS_ENTROPY = (
    CrossEntropyCase(),
    CrossEntropyCase(features=("label_smoothing", "none"), V=331),
    CrossEntropyCase(features=("label_smoothing", "z_loss", "softcap", "sum")),
    CrossEntropyCase("linear_cross_entropy"),
    CrossEntropyCase("linear_cross_entropy", ("label_smoothing", "bias", "chunks")),
    CrossEntropyCase("linear_cross_entropy", ("z_loss", "softcap", "none", "chunks")),
    CrossEntropyCase("linear_cross_entropy", ("bias", "chunks"), V=104),
)
"""Every feature once."""


def verify_cross_entropy_cases() -> list[CrossEntropyCase]:
    """The shape classes of real models: vocabularies of bytes to 128k, one chunk and more."""
    shapes = ((65536, 256), (16384, 8192), (8192, 32000), (4096, 50257), (2048, 131072))
    kinds: tuple[tuple[str, ...], ...] = ((), ("label_smoothing",), ("z_loss", "softcap"))
    cases = [CrossEntropyCase(features=kind, N=N, V=V) for kind in kinds for N, V in shapes]
    widths = ((4096, 768), (5120, 768), (4096, 2048), (5120, 2048), (5120, 8192))
    # Of a vocabulary that is no multiple of 8 the products are cuBLAS's in every backend.
    for V in (50257, 50304):
        cases += [CrossEntropyCase("linear_cross_entropy", (), N, V, C) for N, C in widths]
    return cases
