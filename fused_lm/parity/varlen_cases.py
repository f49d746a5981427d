"""The cases of ``attention_varlen`` in ``fused-lm parity`` and ``verify``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas
from fused_lm.reference.attention import visible as band_of

if TYPE_CHECKING:
    from fused_lm.parity.cases import Problem

SOFTCAP = 20.0


@dataclass(frozen=True)
class VarlenCase:
    """B sequences of T tokens on average, from T // 4 to 7 T // 4 of them in no order.

    Features: "causal", "window" of T // 4, "softcap", "cross": half as many queries as keys.
    """

    features: tuple[str, ...] = ()
    B: int = 3
    H: int = 4
    Hkv: int = 4
    T: int = 24
    D: int = 32
    op: str = field(default="attention_varlen", init=False)

    @property
    def name(self) -> str:
        shape = f"b{self.B} h{self.H}/{self.Hkv} t{self.T} d{self.D}"
        return f"{'+'.join(self.features) or 'plain'} {shape}"

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Of queries and of keys."""
        least, step = self.T // 4, 3 * self.T // 2 / max(self.B - 1, 1)
        # 7 i mod B goes through all of them where 7 does not divide B.
        order = [7 * i % self.B for i in range(self.B)] if self.B % 7 else list(range(self.B))
        keys = [least + int(i * step) for i in order] if self.B > 1 else [self.T]
        return [n // 2 for n in keys] if "cross" in self.features else keys, keys

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        from fused_lm.parity.cases import Problem

        lengths = self.lengths
        bounds = [_bounds(each, device) for each in lengths]
        N, M = (sum(each) for each in lengths)
        q = torch.randn(N, self.H, self.D, device=device).to(dtype)
        k, v = (torch.randn(M, self.Hkv, self.D, device=device).to(dtype) for _ in range(2))
        options: dict[str, Any] = {}
        if "causal" in self.features:
            options["causal"] = "bottom_right"
        if "window" in self.features:
            options["window"] = (self.T // 4, 0)
        if "softcap" in self.features:
            options["softcap"] = SOFTCAP
        of_torch = self._options_of_torch(q)
        returns_lse = fused_lm.dispatch.current_backend() != "pytorch"

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            found = fused_lm.attention_varlen(q, k, v, *bounds, **options, return_lse=returns_lse)
            return found if isinstance(found, tuple) else (found,)

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            if fused_lm.dispatch.current_backend() == "pytorch" and of_torch is not None:
                return (_varlen_attn()(q, k, v, *bounds, *map(max, lengths), **of_torch),)
            out = fused_lm.attention_varlen(q, k, v, *bounds, **options)
            return out if isinstance(out, tuple) else (out,)

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            found = self._formula(q, k, v)
            return found if returns_lse else found[:1]

        outputs = ("out", "lse") if returns_lse else ("out",)
        places = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
        arguments = {"q": q, "k": k, "v": v, **places, **options}
        return Problem(ours, formula, (q, k, v), outputs, ("q", "k", "v"), theirs, arguments)

    def _options_of_torch(self, q: Tensor) -> dict[str, Any] | None:
        """How torch's own kernel is told the case, the fastest that its users have; None where it
        has none: the oldest know no window and no groups, and none has a softcap.
        """
        attend = _varlen_attn()
        half = q.dtype in (torch.float16, torch.bfloat16)
        if attend is None or not q.is_cuda or not half or "softcap" in self.features:
            return None
        known, options = inspect.signature(attend).parameters, dict[str, Any]()
        if self.Hkv != self.H:
            options["enable_gqa"] = True
        if "window" in self.features:
            options["window_size"] = (self.T // 4, 0)
        elif "causal" in self.features:
            options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        return options if options.keys() <= known.keys() else None

    def _formula(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lower = -(self.T // 4) if "window" in self.features else None
        upper = 0 if {"causal", "window"} & set(self.features) else None
        softcap = SOFTCAP if "softcap" in self.features else 0.0
        outputs, statistics = [], []
        each_of = (*self.lengths, self.lengths[1])
        pieces = (t.split(each) for t, each in zip((q, k, v), each_of, strict=True))
        for one in zip(*pieces, strict=True):
            rows, keys, values = (t.transpose(0, 1)[None] for t in one)
            T, S = rows.shape[2], keys.shape[2]
            begin, end = (None if b is None else b + S - T for b in (lower, upper))
            visible = band_of(T, S, begin, end, q.device)
            if visible is not None:
                visible = visible.expand(1, self.H, T, S)
            out, lse, _ = formulas.attention(rows, keys, values, visible=visible, softcap=softcap)
            outputs.append(out[0].transpose(0, 1))
            statistics.append(lse[0])
        return torch.cat(outputs), torch.cat(statistics, 1)


def _bounds(lengths: list[int], device: torch.device) -> Tensor:
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _varlen_attn() -> Any:
    """Torch's own operator on packed sequences; None in a torch without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


SMALL_VARLEN = (
    VarlenCase(),
    VarlenCase(("causal", "cross"), D=40, Hkv=2),
    VarlenCase(("window", "softcap"), Hkv=1),
)
"""Every feature once."""


def verify_varlen_cases() -> list[VarlenCase]:
    """Batches of training and of serving: 16k tokens, from short to long sequences."""
    sizes = ((16, 1024, 128), (16, 1024, 64), (4, 4096, 128), (128, 128, 64), (64, 256, 128))
    cases = [
        VarlenCase(features, B=B, H=16, Hkv=16, T=T, D=D)
        for B, T, D in (*sizes, (2, 16384, 128), (16, 1024, 256), (16, 1024, 96), (16, 1024, 192))
        for features in (("causal",), ())
    ]
    cases.append(VarlenCase(("causal",), B=16, H=32, Hkv=8, T=1024, D=128))
    cases.append(VarlenCase(("window",), B=4, H=16, Hkv=16, T=4096, D=128))
    cases.append(VarlenCase(("causal", "softcap"), B=16, H=16, Hkv=8, T=1024, D=256))
    return cases
