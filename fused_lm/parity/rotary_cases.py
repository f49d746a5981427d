"""The rotary cases of ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.nn.positions import rotary_tables

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem


@dataclass(frozen=True)
class RotaryCase:
    """One call of ``rotary``, or of ``rotary_qk`` for a "pair", on heads that lie as [B, T, H, D].

    R dims of D are turned.
    """

    features: tuple[str, ...] = ()
    B: int = 2
    H: int = 4
    Hkv: int = 2
    T: int = 33
    D: int = 32
    R: int = 32
    op: str = field(default="rotary", init=False)

    @property
    def name(self) -> str:
        shape = f"b{self.B} h{self.H}/{self.Hkv} t{self.T} d{self.D} r{self.R}"
        return f"{'+'.join(self.features) or 'plain'} {shape}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        pair = "pair" in self.features
        names = ("q", "k") if pair else ("x",)
        inputs = [
            torch.randn(self.B, self.T, heads, self.D, device=device).to(dtype).transpose(1, 2)
            for heads in (self.H, self.Hkv)[: len(names)]
        ]
        cos, sin = rotary_tables(torch.arange(self.T, device=device), self.R)
        options: dict[str, Any] = {"interleaved": "interleaved" in self.features}
        if "positions" in self.features:
            options["positions"] = torch.randint(self.T, (self.B, self.T), device=device)

        def call(*tensors: Tensor) -> Sequence[Tensor]:
            if pair:
                return fused_lm.rotary_qk(tensors[0], tensors[1], cos, sin, **options)
            return (fused_lm.rotary(tensors[0], cos, sin, **options),)

        def formula_of(*tensors: Tensor) -> Sequence[Tensor]:
            return [formula(t, cos, sin, **options) for t in tensors]

        outputs = tuple(f"{name}_turned" for name in names)
        arguments = {"x": inputs[0], "cos": cos, "sin": sin, **options}
        return Problem(call, formula_of, inputs, outputs, names, call, arguments)


def formula(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """``x * cos + partner(x) * sin`` by indices, where each dim has a partner and a sign."""
    B, _, T, D = x.shape
    half = cos.shape[1]
    dim_idx = torch.arange(D, device=x.device)
    turned, second = dim_idx < 2 * half, dim_idx % 2 == 1 if interleaved else dim_idx >= half
    pair_idx = dim_idx // 2 if interleaved else dim_idx % half
    step = 1 if interleaved else half
    partner = torch.where(turned, torch.where(second, dim_idx - step, dim_idx + step), dim_idx)
    rows = torch.arange(T, device=x.device) if positions is None else positions
    at = rows.expand(B, T)[:, None, :, None], pair_idx * turned
    dtype = torch.promote_types(x.dtype, torch.float32)
    factor = torch.where(turned, cos[at].to(dtype), 1.0)
    other = torch.where(turned, sin[at].to(dtype) * torch.where(second, 1.0, -1.0), 0.0)
    wide = x.to(dtype)
    return (wide * factor + wide[..., partner] * other).to(x.dtype)


SMALL_ROTARY = (
    RotaryCase(),
    RotaryCase(("pair", "interleaved"), D=40, R=40),
    RotaryCase(("pair", "positions"), D=40, R=16),
)
"""Every feature once."""


def verify_rotary_cases() -> list[RotaryCase]:
    """The shape classes of real models: 16k tokens of each head dim and kind of pair."""
    return [
        RotaryCase(features, B=8, H=H, Hkv=Hkv, T=2048, D=D, R=D)
        for features in ((), ("interleaved",))
        for H, Hkv, D in ((16, 16, 64), (32, 8, 128), (16, 8, 256))
    ]
