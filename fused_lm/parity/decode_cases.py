"""The cases of ``attention_decode`` in ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem

SOFTCAP = 20.0


@dataclass(frozen=True)
class DecodeCase:
    """T new tokens of B sequences with up to S keys, H / Hkv heads to a key head.

    Features: "ragged" lengths from S // 4 to S, "window" of S // 4, "softcap". A page of 0 is a
    contiguous cache, else its blocks lie in a random order.
    """

    features: tuple[str, ...] = ()
    B: int = 2
    H: int = 4
    Hkv: int = 2
    T: int = 1
    S: int = 96
    D: int = 32
    page: int = 0
    op: str = field(default="attention_decode", init=False)

    @property
    def name(self) -> str:
        where = f" page{self.page}" if self.page else ""
        shape = f"b{self.B} h{self.H}/{self.Hkv} t{self.T} s{self.S} d{self.D}{where}"
        return f"{'+'.join(self.features) or 'plain'} {shape}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        B, Hkv, S, D = self.B, self.Hkv, self.S, self.D
        q = torch.randn(B, self.H, self.T, D, device=device).to(dtype)
        cache = (B, Hkv, S, D) if not self.page else (B * S // self.page, Hkv, self.page, D)
        k, v = (torch.randn(cache, device=device).to(dtype) for _ in range(2))
        lens = torch.full((B,), S, device=device)
        if "ragged" in self.features:
            lens = torch.linspace(S // 4, S, B, device=device).long()
        table = None
        if self.page:
            table = torch.randperm(cache[0], device=device).view(B, -1).int()
        options: dict[str, Any] = {"cache_lens": lens.int(), "block_table": table}
        if "window" in self.features:
            options["window"] = (S // 4, 0)
        if "softcap" in self.features:
            options["softcap"] = SOFTCAP
        returns_lse = fused_lm.dispatch.current_backend() != "pytorch"

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            found = fused_lm.attention_decode(q, k, v, **options, return_lse=returns_lse)
            return found if isinstance(found, tuple) else (found,)

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            out = fused_lm.attention_decode(q, k, v, **options)
            return out if isinstance(out, tuple) else (out,)

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            found = self._formula(q, k, v, lens, table)
            return found if returns_lse else found[:1]

        outputs = ("out", "lse") if returns_lse else ("out",)
        arguments = {"q": q, "k_cache": k, "v_cache": v, **options}
        names = ("q", "k", "v")
        return Problem(ours, formula, (q, k, v), outputs, names, theirs, arguments)

    def _formula(
        self, q: Tensor, k: Tensor, v: Tensor, lens: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if table is not None:
            k, v = (
                t.index_select(0, table.flatten()).unflatten(0, table.shape)
                .transpose(1, 2).flatten(2, 3)
                for t in (k, v)
            )  # fmt: skip
        key = torch.arange(self.S, device=q.device)
        row = lens[:, None] - self.T + torch.arange(self.T, device=q.device)
        visible = key <= row[..., None]
        if "window" in self.features:
            visible = visible & (key >= row[..., None] - self.S // 4)
        visible = visible[:, None].expand(self.B, self.H, -1, -1)
        softcap = SOFTCAP if "softcap" in self.features else 0.0
        out, lse, _ = formulas.attention(q, k, v, visible=visible, softcap=softcap)
        return out, lse


SMALL_DECODE = (
    DecodeCase(),
    DecodeCase(("ragged", "window"), T=3, D=40),
    DecodeCase(("ragged", "softcap"), T=2, page=16, Hkv=1),
)
"""Every feature once."""


def verify_decode_cases() -> list[DecodeCase]:
    """One token after contexts of each size, and a few: heads as in models of 7B and more."""
    cases = [
        DecodeCase((), B=B, H=H, Hkv=Hkv, S=S, D=D, page=page)
        for B, H, Hkv, S, D in (
            (16, 32, 8, 4096, 128),
            (1, 32, 8, 32768, 128),
            (1, 32, 8, 131072, 128),
            (64, 12, 12, 1024, 64),
            (16, 32, 8, 4096, 64),
            (8, 16, 8, 4096, 256),
        )
        for page in (0, 64)
    ]
    cases.append(DecodeCase(("ragged",), B=32, H=64, Hkv=8, S=8192, D=128, page=16))
    cases.append(DecodeCase(("window",), B=16, H=32, Hkv=8, S=8192, D=128))
    cases.append(DecodeCase(("softcap",), B=16, H=16, Hkv=8, S=4096, D=256))
    cases.append(DecodeCase((), B=8, H=32, Hkv=8, T=4, S=4096, D=128))
    return cases
