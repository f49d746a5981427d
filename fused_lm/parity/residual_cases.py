"""The ``linear_residual`` cases of ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas
from fused_lm.reference.philox import scaled_keep

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem


@dataclass(frozen=True)
class ResidualCase:
    """One call on x [N, C], F wide. Features: dropout, wide (an fp32 stream), transposed."""

    features: tuple[str, ...] = ()
    N: int = 70
    C: int = 72
    F: int = 136
    op: str = field(default="linear_residual", init=False)

    @property
    def name(self) -> str:
        return f"{'+'.join(self.features) or 'plain'} n{self.N} c{self.C} f{self.F}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        transposed = "transposed" in self.features
        shape = (self.C, self.F) if transposed else (self.F, self.C)
        inputs = {
            "x": torch.randn(self.N, self.C, device=device).to(dtype),
            "weight": (torch.randn(shape, device=device) * self.C**-0.5).to(dtype),
            "bias": torch.randn(self.F, device=device).to(dtype),
            "residual": torch.randn(self.N, self.F, device=device).to(
                torch.float32 if "wide" in self.features else dtype
            ),
        }
        names = list(inputs)
        options: dict[str, Any] = {"transposed": transposed}
        if "dropout" in self.features:
            options |= {"dropout_p": 0.1, "rng": fused_lm.make_rng(device)}

        def call(*tensors: Tensor, **more: Any) -> Sequence[Tensor]:
            given: dict[str, Any] = dict(zip(names, tensors, strict=True))
            return (fused_lm.linear_residual(**given, **{**options, **more}),)

        def formula(*tensors: Tensor) -> Sequence[Tensor]:
            x, weight, bias, residual = tensors
            z = formulas.linear_act(x, weight, bias, "none", transposed)
            if "rng" in options:
                p = options["dropout_p"]
                keep = scaled_keep(options["rng"], 1, 1, self.N, self.F, p, torch.float64)[0, 0]
                z = z * keep.to(z.dtype)
            return (residual + z,)

        def theirs(*tensors: Tensor) -> Sequence[Tensor]:
            return call(*tensors, rng=None)

        arguments = {**inputs, **options, "rng": None}
        return Problem(call, formula, list(inputs.values()), ("y",), names, theirs, arguments)


SMALL_RESIDUAL: tuple[ResidualCase, ...] = (
    ResidualCase(),
    ResidualCase(("dropout",)),
    ResidualCase(("dropout", "wide"), N=33, C=56, F=48),
    ResidualCase(("wide", "transposed")),
)
"""Every feature once, small enough for Triton's interpreter on a CPU."""


def verify_residual_cases() -> list[ResidualCase]:
    """The widths of real models, the ends of attention and of a feed-forward network."""
    sizes = [(16384, 768, 768), (16384, 3072, 768), (8192, 4096, 4096)]
    kinds: list[tuple[str, ...]] = [(), ("dropout",), ("wide",)]
    return [ResidualCase(kind, N, C, F) for N, C, F in sizes for kind in kinds]
