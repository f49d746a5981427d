"""The cases of ``fused-lm parity`` and ``verify``: one per feature and shape class of every
operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fused_lm
from fused_lm.parity import formulas
from fused_lm.parity.cross_entropy_cases import (
    SMALL_CROSS_ENTROPY,
    CrossEntropyCase,
    verify_cross_entropy_cases,
)
from fused_lm.parity.decode_cases import SMALL_DECODE, DecodeCase, verify_decode_cases
from fused_lm.parity.judge import Function
from fused_lm.parity.linear_cases import SMALL_LINEAR, LinearCase, verify_linear_cases
from fused_lm.parity.residual_cases import (
    SMALL_RESIDUAL,
    ResidualCase,
    verify_residual_cases,
)
from fused_lm.parity.rotary_cases import SMALL_ROTARY, RotaryCase, verify_rotary_cases
from fused_lm.parity.varlen_cases import SMALL_VARLEN, VarlenCase, verify_varlen_cases
from fused_lm.reference.attention import visible as band_of
from fused_lm.reference.philox import scaled_keep


@dataclass(frozen=True)
class Problem:
    """A case on a device, ready to run: see :func:`fused_lm.parity.judge.judge`."""

    ours: Function
    formula: Function
    inputs: Sequence[Tensor]
    output_names: Sequence[str]
    input_names: Sequence[str]
    theirs: Function
    """The call as PyTorch's operators take it (their own dropout mask, no lse), for timing."""
    arguments: dict[str, Any]
    """The keyword arguments of ``theirs``, for what dispatch says about the call."""


@dataclass(frozen=True)
class AttentionCase:
    """One attention call. Sizes as in :func:`fused_lm.attention`; ``features`` name what is on."""

    features: tuple[str, ...] = ()
    B: int = 2
    H: int = 4
    Hkv: int = 4
    T: int = 33
    S: int = 33
    D: int = 32
    op: str = field(default="attention", init=False)

    @property
    def name(self) -> str:
        heads = f"h{self.H}" if self.Hkv == self.H else f"h{self.H}/{self.Hkv}"
        shape = f"b{self.B} {heads} t{self.T} s{self.S} d{self.D}"
        return f"{'+'.join(self.features) or 'plain'} {shape}"

    def sized(self, S: int, D: int) -> AttentionCase:
        """The same features at S = T and head dim D, with the batch kept at 16k tokens or less."""
        return replace(self, B=max(1, min(self.B, 16384 // S)), T=S, S=S, D=D)

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        B, H, T, S = self.B, self.H, self.T, self.S
        options, band = self._options(device)
        names = ["q", "k", "v"]
        inputs = [
            randn(B, H, T, self.D),
            randn(B, self.Hkv, S, self.D),
            randn(B, self.Hkv, S, self.D),
        ]
        if "bias" in self.features:
            names.append("bias")
            inputs.append(randn(1, H, T, S))
        keep_state = options.get("rng")

        def visible() -> Tensor:
            every = torch.ones(B, 1, T, S, dtype=torch.bool, device=device)
            if "mask" in options:
                every = every & options["mask"]
            if "key_mask" in options:
                every = every & options["key_mask"][:, None, None]
            inside = band_of(T, S, *band, device)
            every = every if inside is None else every & inside
            return every.expand(B, H, T, S)

        def call(*tensors: Tensor, **more: Any) -> Any:
            bias = tensors[3] if len(tensors) > 3 else None
            return fused_lm.attention(*tensors[:3], bias=bias, **{**options, **more})

        def ours(*tensors: Tensor) -> Sequence[Tensor]:
            if fused_lm.dispatch.current_backend() == "pytorch":
                return (call(*tensors),)
            return call(*tensors, return_lse=True)

        def formula(*tensors: Tensor) -> Sequence[Tensor]:
            keep = None
            if keep_state is not None:
                keep = scaled_keep(keep_state, B, H, T, S, options["dropout_p"], torch.float64)
            out, lse, _ = formulas.attention(
                *tensors[:3],
                visible=visible(),
                bias=tensors[3] if len(tensors) > 3 else None,
                softcap=options.get("softcap", 0.0),
                keep=keep,
            )
            return (out,) if fused_lm.dispatch.current_backend() == "pytorch" else (out, lse)

        def theirs(*tensors: Tensor) -> Sequence[Tensor]:
            return (call(*tensors, rng=None),)

        outputs = ("out",) if fused_lm.dispatch.current_backend() == "pytorch" else ("out", "lse")
        arguments = {**dict(zip(names, inputs, strict=True)), **options, "rng": None}
        return Problem(ours, formula, inputs, outputs, names, theirs, arguments)

    def _options(
        self, device: torch.device
    ) -> tuple[dict[str, Any], tuple[int | None, int | None]]:
        options: dict[str, Any] = {}
        band: tuple[int | None, int | None] = (None, None)
        if "causal" in self.features:
            options["causal"], band = "bottom_right", (None, self.S - self.T)
        if "window" in self.features:
            left = max(1, self.S // 4)
            options["window"], band = (left, 0), (self.S - self.T - left, self.S - self.T)
        if "mask" in self.features:
            options["mask"] = torch.rand(self.B, 1, self.T, self.S, device=device) > 0.2
        if "key_mask" in self.features:
            lengths = torch.linspace(self.S // 2, self.S, self.B, device=device).long()
            options["key_mask"] = torch.arange(self.S, device=device) < lengths[:, None]
        if "softcap" in self.features:
            options["softcap"] = 20.0
        if "dropout" in self.features:
            options["dropout_p"] = 0.1
            options["rng"] = fused_lm.make_rng(device)
        return options, band


@dataclass(frozen=True)
class NormCase:
    """One norm call on [N, C]; "mixed" keeps the residual stream in fp32, as autocast does."""

    op: str = "layer_norm"
    features: tuple[str, ...] = ()
    N: int = 37
    C: int = 96

    @property
    def name(self) -> str:
        return f"{'+'.join(self.features) or 'plain'} n{self.N} c{self.C}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        rms = self.op == "rms_norm"
        shapes = {"x": (self.N, self.C), "weight": (self.C,)}
        if not rms:
            shapes["bias"] = (self.C,)
        if "add" in self.features:
            shapes["residual"] = (self.N, self.C)
        options: dict[str, Any] = {}
        if "dropout" in self.features:
            options = {"dropout_p": 0.1, "rng": fused_lm.make_rng(device)}
        names = list(shapes)
        wide = {"residual"} if "mixed" in self.features else set()
        inputs = [
            torch.randn(shape, device=device).to(torch.float32 if name in wide else dtype)
            for name, shape in shapes.items()
        ]

        def call(*tensors: Tensor, **more: Any) -> Any:
            given = dict(zip(names, tensors, strict=True))
            function = fused_lm.rms_norm if rms else fused_lm.layer_norm
            arguments = {**given, **options, **more, "eps": 1e-5, "return_residual": True}
            return function(**arguments)

        def formula(*tensors: Tensor) -> Sequence[Tensor]:
            given = dict(zip(names, tensors, strict=True))
            keep = None
            if "rng" in options:
                p = options["dropout_p"]
                keep = scaled_keep(options["rng"], 1, 1, self.N, self.C, p, torch.float64)[0, 0]
            return formulas.layer_norm(
                given["x"], given["weight"], given.get("bias"), 1e-5,
                residual=given.get("residual"), keep=keep, rms=rms,
            )  # fmt: skip

        def theirs(*tensors: Tensor) -> Sequence[Tensor]:
            return call(*tensors, rng=None)

        arguments = {**dict(zip(names, inputs, strict=True)), **options, "rng": None}
        return Problem(call, formula, inputs, ("y", "stream"), names, theirs, arguments)


@dataclass(frozen=True)
class WeightsCase:
    """One call of ``attention_weights``, from the ``lse`` of the same backend."""

    average_heads: bool = True
    B: int = 2
    H: int = 4
    T: int = 33
    S: int = 33
    D: int = 32
    features: tuple[str, ...] = ("causal",)
    op: str = field(default="attention_weights", init=False)

    @property
    def name(self) -> str:
        kind = "mean over heads" if self.average_heads else "per head"
        return f"{kind} b{self.B} h{self.H} t{self.T} s{self.S} d{self.D}"

    def build(self, dtype: torch.dtype, device: torch.device) -> Problem:
        B, H, T, S, D = self.B, self.H, self.T, self.S, self.D
        q, k = (torch.randn(B, H, n, D, device=device).to(dtype) for n in (T, S))
        lse = torch.empty(B, H, T, device=device)  # only its shape is asked for
        options: dict[str, Any] = {"causal": "bottom_right"}
        options["average_heads"] = self.average_heads

        def call(q: Tensor, k: Tensor) -> Sequence[Tensor]:
            _, lse = fused_lm.attention(q, k, k, causal="bottom_right", return_lse=True)
            return (fused_lm.attention_weights(q, k, lse, **options),)

        def formula(q: Tensor, k: Tensor) -> Sequence[Tensor]:
            visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
            weights = formulas.attention(q, k, k, visible=visible.expand(B, H, T, S))[2]
            return (weights.mean(1) if self.average_heads else weights,)

        arguments = {"q": q, "k": k, "lse": lse, **options}
        return Problem(call, formula, (q, k), ("weights",), ("q", "k"), call, arguments)


Case = (
    AttentionCase
    | NormCase
    | WeightsCase
    | DecodeCase
    | VarlenCase
    | RotaryCase
    | LinearCase
    | ResidualCase
    | CrossEntropyCase
)

SMALL: tuple[Case, ...] = (
    AttentionCase(),
    AttentionCase(("causal",)),
    AttentionCase(("causal",), H=4, Hkv=2, T=20, S=45, D=40),
    AttentionCase(("window",), T=70, S=70, D=16, H=2, Hkv=2),
    AttentionCase(("mask", "bias")),
    AttentionCase(("key_mask", "causal"), D=80, H=2, Hkv=2),
    AttentionCase(("softcap",), D=16),
    AttentionCase(("dropout", "causal")),
    WeightsCase(),
    WeightsCase(average_heads=False, T=20, S=45, D=40),
    NormCase(),
    NormCase(features=("add",), C=100),
    NormCase(features=("dropout", "add"), C=257),
    NormCase("rms_norm"),
    NormCase("rms_norm", ("dropout", "add"), C=100),
    *SMALL_DECODE,
    *SMALL_VARLEN,
    *SMALL_ROTARY,
    *SMALL_LINEAR,
    *SMALL_RESIDUAL,
    *SMALL_CROSS_ENTROPY,
)
"""Every feature once, small enough for Triton's interpreter on a CPU."""


NORM_SIZES = ((32768, 128), (16384, 768), (8192, 4096), (8192, 6144), (4096, 8192), (2048, 24576))
"""[N, C], one in every class of ``ops/layernorm_checks.py``."""
_FUSED: tuple[tuple[str, ...], ...] = ((), ("add",), ("dropout", "add"), ("add", "mixed"))
NORM_KINDS = [(op, features) for features in _FUSED for op in ("layer_norm", "rms_norm")]


def verify_cases() -> list[Case]:
    """The shape classes of real models, in order of worth: verify stops where its minutes end."""
    cases: list[Case] = []
    common, rare = NORM_SIZES[1:3], NORM_SIZES[3:] + NORM_SIZES[:1]
    cases += [NormCase(op, features, N, C) for N, C in common for op, features in NORM_KINDS]
    cases += verify_rotary_cases()
    cases += verify_linear_cases()
    cases += verify_residual_cases()
    cases += verify_cross_entropy_cases()
    cases += [WeightsCase(average, B=8, H=16, T=1024, S=1024, D=64) for average in (True, False)]
    ladder = [
        AttentionCase(("causal",), B=32, H=16, Hkv=16),
        AttentionCase((), B=32, H=16, Hkv=16),
        AttentionCase(("key_mask",), B=32, H=16, Hkv=16),
        AttentionCase(("dropout", "causal"), B=32, H=16, Hkv=16),
        AttentionCase(("key_mask", "causal"), B=32, H=16, Hkv=16),
        AttentionCase(("bias",), B=32, H=16, Hkv=16),
        AttentionCase(("mask",), B=32, H=16, Hkv=16),
        AttentionCase(("window",), B=32, H=16, Hkv=16),
    ]
    for S, D in ((1024, 64), (1024, 128), (512, 64), (4096, 128), (4096, 64), (16384, 128)):
        cases += [
            case.sized(S, D) for case in ladder if S <= 4096 or case.features in ((), ("causal",))
        ]
    cases += [case.sized(1024, D) for D in (96, 256, 32, 192) for case in ladder[:2]]
    shared_keys = AttentionCase(("bias", "dropout"), B=16, H=16, Hkv=4)
    cases += [shared_keys.sized(1024, D) for D in (128, 192)]
    cases += verify_decode_cases()
    cases += verify_varlen_cases()
    cases += [NormCase(op, features, N, C) for N, C in rare for op, features in NORM_KINDS]
    return cases
