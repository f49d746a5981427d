"""The ``linear_act`` and ``ffn`` cases of ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem

GATED = ("swiglu", "geglu", "geglu_tanh")


@dataclass(frozen=True)
class LinearCase:
    """One call on x [N, C], F wide inside. Features: transposed, recompute."""

    op: str = "ffn"
    activation: str = "gelu"
    features: tuple[str, ...] = ()
    N: int = 70
    C: int = 72
    F: int = 136

    @property
    def name(self) -> str:
        kinds = "+".join((self.activation, *self.features))
        return f"{kinds} n{self.N} c{self.C} f{self.F}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        transposed = "transposed" in self.features
        width = 2 * self.F if self.activation in GATED else self.F

        def matrix(out: int, inner: int) -> Tensor:
            shape = (inner, out) if transposed else (out, inner)
            return (torch.randn(shape, device=device) * inner**-0.5).to(dtype)

        inputs: dict[str, Any] = {
            "x": torch.randn(self.N, self.C, device=device).to(dtype),
            "up_weight": matrix(width, self.C),
            "up_bias": torch.randn(width, device=device).to(dtype),
        }
        if self.op == "ffn":
            inputs["down_weight"] = matrix(self.C, self.F)
            inputs["down_bias"] = torch.randn(self.C, device=device).to(dtype)
        options: dict[str, Any] = {"activation": self.activation, "transposed": transposed}
        names = list(inputs)

        def call(*tensors: Any) -> Sequence[Tensor]:
            if self.op == "linear_act":
                return (fused_lm.linear_act(*tensors, **options),)
            given: dict[str, Any] = dict(zip(names, tensors, strict=True))
            return (fused_lm.ffn(**given, recompute="recompute" in self.features, **options),)

        def formula(*tensors: Any) -> Sequence[Tensor]:
            given: dict[str, Any] = dict(zip(names, tensors, strict=True))
            if self.op == "linear_act":
                return (formulas.linear_act(*tensors, **options),)
            return (formulas.ffn(**given, **options),)

        arguments: dict[str, Any] = {**inputs, **options}
        if self.op == "linear_act":
            arguments = {"x": inputs["x"], "weight": inputs["up_weight"], **options}
            arguments["bias"] = inputs["up_bias"]
            names_shown = ["x", "weight", "bias"]
        else:
            arguments["recompute"] = "recompute" in self.features
            names_shown = names
        return Problem(call, formula, list(inputs.values()), ("y",), names_shown, call, arguments)


SMALL_LINEAR: tuple[LinearCase, ...] = (
    *(LinearCase("linear_act", name) for name in ("relu", "gelu", "gelu_tanh", "silu")),
    LinearCase("linear_act", "relu_squared", ("transposed",)),
    LinearCase("linear_act", "swiglu", N=33, C=50, F=30),
    LinearCase("linear_act", "none"),
    LinearCase(),
    LinearCase("ffn", "gelu_tanh", ("transposed", "recompute")),
    LinearCase("ffn", "relu", N=33, C=50, F=70),
    LinearCase("ffn", "swiglu", ("recompute",)),
    LinearCase("ffn", "geglu_tanh"),
)
"""Every feature once, small enough for Triton's interpreter on a CPU."""


def verify_linear_cases() -> list[LinearCase]:
    """The widths of real models, in order of worth."""
    cases = []
    for C in (768, 1024, 2048, 4096):
        N = 16384 if C <= 1024 else 8192
        gated = -(-8 * C // (3 * 64)) * 64
        cases += [
            LinearCase("ffn", "gelu", ("recompute",), N, C, 4 * C),
            LinearCase("ffn", "gelu", (), N, C, 4 * C),
            LinearCase("ffn", "swiglu", ("recompute",), N, C, gated),
            LinearCase("linear_act", "none", (), N, C, 3 * C),
            LinearCase("linear_act", "gelu", (), N, C, 4 * C),
            LinearCase("ffn", "swiglu", (), N, C, gated),
            LinearCase("linear_act", "swiglu", (), N, C, gated),
            LinearCase("ffn", "gelu_tanh", ("transposed", "recompute"), N, C, 4 * C),
        ]
    return cases
