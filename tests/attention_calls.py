"""Attentions that reach every branch of the CUDA kernels, each with what it is there for, and their
inputs: a table for the harness' tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from fused_lm.reference import attention as reference
from tests.simt.runtime import LARGE_SHARED, MEDIUM_SHARED, SMALL_SHARED

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Of csrc/kernels/attention_tuning.h."""
TEAM_WARPS = {
    ("out", 192): (8, 8),
    ("out", 256): (8, 8),
    ("dkdv", 96): (4, 8),
    ("dkdv", 128): (4, 8),
    ("dv", 192): (4, 4),
    ("dv", 256): (4, 8),
    ("dk", 192): (4, 8),
    ("dk", 256): (8, 4),
    ("dq", 192): (4, 8),
    ("dq", 256): (8, 4),
}
"""What runs in teams of warps, and how many warps a block has on an H100 and on an A100."""
GENERAL_TEAM_WARPS = {
    **TEAM_WARPS,
    ("out", 96): (4, 4),
    ("out", 128): (4, 4),
    ("out", 192): (4, 8),
    ("out", 256): (4, 8),
    ("dq", 96): (4, 4),
    ("dq", 128): (4, 4),
}
RNG = torch.tensor([2**61 + 12345, 77, 3, 5])


class Layout(Enum):
    """How q, k and v lie, and mask and bias with them."""

    DENSE = auto()
    PACKED = auto()  # [B, T, H, D], as a projection leaves them
    SLICED = auto()  # rows apart, from the middle of 16 bytes
    SHIFTED = auto()  # dense, but from the second element on
    CUT = auto()  # mask and bias, of longer rows than are used
    EXPANDED = auto()  # k and v of one head and batch for all, stride 0
    TURNED = auto()  # the last two dims exchanged in memory


@dataclass(frozen=True)
class Call:
    """One attention; ``why`` is what it is there for. Letters of ``mask`` and ``bias`` are dims,
    "11TS"; ``group`` query heads share a key head; row t sees keys t + lower .. t + upper.
    """

    why: str
    T: int
    S: int
    D: int = 64
    Dv: int = 0
    dtype: torch.dtype = BF16
    B: int = 1
    H: int = 2
    group: int = 1
    lower: int | None = None
    upper: int | None = None
    mask: str = ""
    key_mask: bool = False
    bias: str = ""
    bias_dtype: torch.dtype = BF16
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    layout: Layout = Layout.DENSE
    size: float = 1.0  # of the numbers in q and k
    hides: bool = False  # the bias, by -inf
    shared_bytes: int = LARGE_SHARED  # of a block on the GPU of the harness; a real one has its own

    @property
    def values(self) -> int:
        return self.Dv or self.D

    @property
    def head_dim(self) -> int:
        """The compiled one."""
        return min(dim for dim in HEAD_DIMS if dim >= max(self.D, self.values))

    @property
    def general(self) -> bool:
        features = self.mask, self.bias, self.key_mask, self.softcap, self.dropout_p
        return any(features) or (self.scale is not None and self.scale < torch.finfo(F32).tiny)

    @property
    def _teams(self) -> dict[tuple[str, int], tuple[int, int]]:
        return GENERAL_TEAM_WARPS if self.general else TEAM_WARPS

    def team_warps(self, makes: str) -> int:
        """Of a block of what makes "out", "dk", "dv", "dkdv" or "dq"; 0 without teams."""
        large, medium = self._teams.get((makes, self.head_dim), (0, 0))
        return {LARGE_SHARED: large, MEDIUM_SHARED: medium, SMALL_SHARED: 0}[self.shared_bytes]


DTYPES = {"bf16": BF16, "fp16": F16}
OF_EACH_HEAD: dict[str, Any] = {
    "B": 2,
    "group": 2,
    "mask": "BHTS",
    "bias": "BHTS",
    "dropout_p": 0.3,
}
"""Features that differ by query head, of heads that share keys."""
ALONE: dict[str, Any] = {"shared_bytes": SMALL_SHARED}
MEDIUM: dict[str, Any] = {"shared_bytes": MEDIUM_SHARED}
FEATURES: dict[str, Any] = {
    "mask": "11TS",
    "key_mask": True,
    "bias": "11TS",
    "bias_dtype": F32,
    "scale": 0.2,
    "softcap": 2.0,
    "dropout_p": 0.2,
}
KERNELS = [
    *(
        Call(f"{kind}, {name} {D}", 40, 150, D, dtype=dtype, H=1, upper=110, **features)
        for D in HEAD_DIMS
        for name, dtype in DTYPES.items()
        for kind, features in (("plain", {}), ("general", FEATURES))
    ),
    *(
        Call(
            f"{kind} {where}, {name} {D}",
            *(40, 150, D),
            dtype=dtype,
            H=1,
            upper=110,
            **features,
            **shared,
        )
        for kind, features, table in (
            ("plain", {}, TEAM_WARPS),
            ("general", FEATURES, GENERAL_TEAM_WARPS),
        )
        for (makes, D), (large, medium) in table.items()
        for where, shared in (("without teams", ALONE), ("on an A100", MEDIUM))
        for name, dtype in DTYPES.items()
        if makes == "out" and not (shared is MEDIUM and medium == large)  # the same kernel
    ),
]
"""Every instantiation, with all that it can, two tiles of keys or more each."""
CALLS = [
    *KERNELS,
    Call("full tiles alone", 128, 128),
    Call("two query tiles, both ends ragged", 150, 77, B=2),
    Call("one query, as when generating", 1, 70, 128),
    Call("one query and one key", 1, 1, 8),
    Call("no key", 37, 0, 192),
    Call("no key, general", 37, 0, key_mask=True, bias="11T1"),
    Call("no query", 0, 5),
    Call("no batch", 4, 5, B=0),
    Call("causal", 200, 200, 32, upper=0),
    Call("causal, more keys than queries, from the first on", 40, 200, upper=0),
    Call("causal, more keys than queries, to the last", 40, 200, 256, upper=160),
    Call("causal, query tiles without a key", 300, 20, 64, upper=-280),
    Call("causal, query tiles without a key, teams", 300, 20, 192, H=1, upper=-280),
    Call("causal, query tiles without a key, staged", 300, 20, 192, H=1, upper=-280, **ALONE),
    Call("causal, query tiles without a key, general", 300, 20, 96, H=1, upper=-280, softcap=9.0),
    Call("narrow window", 200, 200, 96, lower=-20, upper=5),
    Call("whole tiles between those of both edges", 300, 300, 32, H=1, lower=-200, upper=64),
    Call("window without a left end, q staged", 260, 300, 192, H=1, lower=-30, **ALONE),
    Call(
        "teams: whole tiles between those of both edges", 300, 300, 192, H=1, lower=-200, upper=64
    ),
    Call("teams: maxima that grow, in one warp or both", 150, 300, 256, H=1, size=3.0),
    Call("window in one loop", 200, 200, 128, H=1, lower=-150, upper=20),
    Call("bounds beyond 32 bits hide nothing", 30, 40, lower=-(2**40), upper=2**40),
    Call("a bound beyond 32 bits hides everything", 30, 128, 32, lower=2**40),
    Call("grouped heads", 37, 45, H=6, group=3, B=2, upper=8),
    Call("one key head", 37, 45, 96, H=4, group=4, key_mask=True),
    Call("wider v", 37, 45, 40, 72, F16),
    Call("narrower v", 37, 45, 200, 8),
    Call("no compiled head dim", 50, 40, 136, 136, F16, upper=0),
    Call("8 columns", 50, 40, 8, dropout_p=0.5),
    Call("mask in octets", 37, 104, B=2, mask="BHTS"),
    Call("mask in octets, teams, half of a load", 37, 104, 128, mask="11TS"),
    Call("mask, even keys", 37, 46, B=2, mask="BHTS"),
    Call("mask, whole octets of longer rows", 37, 104, B=2, mask="BHTS", layout=Layout.CUT),
    Call("mask, whole octets off 8 bytes", 37, 104, B=2, mask="BHTS", layout=Layout.SHIFTED),
    Call("mask, whole octets apart", 37, 104, B=2, mask="BHTS", layout=Layout.TURNED),
    Call("mask of queries, whole octets", 37, 104, mask="1HT1"),
    Call("bias, whole pairs of longer rows", 37, 46, bias="1HTS", layout=Layout.CUT),
    Call("teams with features of each batch and head", 37, 104, 128, H=4, **OF_EACH_HEAD),
    Call("the same on an A100", 150, 104, 256, **OF_EACH_HEAD, **MEDIUM),
    Call("the same, of 192 columns", 150, 104, 192, **OF_EACH_HEAD, **MEDIUM),
    Call("the same without teams", 37, 104, 192, **OF_EACH_HEAD, **ALONE),
    Call("the same without teams, of 96 columns", 37, 104, 96, **OF_EACH_HEAD, **ALONE),
    Call("teams with features, narrower v", 70, 104, 200, 72, bias="11TS", bias_dtype=F32),
    Call("a bias of -inf, here and there and all over a row", 37, 70, bias="BHTS", hides=True),
    Call("the same in teams", 37, 130, 128, bias="11TS", bias_dtype=F32, hides=True),
    Call("mask, odd keys", 37, 45, B=2, mask="BHTS"),
    Call("mask of keys for all queries", 37, 46, B=2, mask="B11S"),
    Call("mask of queries", 37, 46, mask="1HT1"),
    Call("key mask, one batch without any", 37, 70, B=3, key_mask=True),
    Call("mask of keys for all queries, in octets", 37, 48, B=2, mask="B11S"),
    Call("bias in bf16 pairs", 37, 46, bias="11TS"),
    Call("bias in fp16 pairs", 37, 46, 32, dtype=F16, bias="1HTS", bias_dtype=F16),
    Call("bias in fp32 pairs, whole sectors", 40, 48, bias="1HTS", bias_dtype=F32),
    Call("bias in bf16, odd", 37, 45, bias="BHTS"),
    Call("bias in fp16, odd", 37, 45, bias="BH1S", bias_dtype=F16),
    Call("bias in fp32, odd", 37, 45, 256, bias="1HTS", bias_dtype=F32),
    Call("bias of queries", 37, 46, 96, bias="1HT1", bias_dtype=F32),
    Call("softcap", 37, 45, 128, softcap=0.7),
    Call("dropout over several tiles", 150, 100, H=3, B=2, dropout_p=0.3, upper=0),
    Call("everything dropped", 37, 45, 192, dropout_p=1.0),
    Call("negative scale", 37, 45, scale=-0.3),
    Call("scale 0", 37, 45, 96, scale=0.0),
    Call("scale below the normal numbers", 37, 45, scale=1e-40),
    Call(
        "every feature",
        *(150, 78, 64, 32, F16),
        B=2,
        H=4,
        group=2,
        lower=-90,
        upper=30,
        mask="B1TS",
        key_mask=True,
        bias="1HTS",
        bias_dtype=F32,
        scale=0.2,
        softcap=4.0,
        dropout_p=0.2,
        layout=Layout.PACKED,
    ),
    Call("many key tiles: rounding must not add up in the sums", 4, 4096, 32, H=1, scale=2.0),
    Call("many key tiles, general", 4, 4096, 32, H=1, scale=2.0, softcap=100.0),
    Call("scores of 1e9, whose last bits are 2^64", 37, 200, dtype=F16, size=1.2e4),
    Call("scores of 1e11, general", 37, 70, size=1e5, key_mask=True),
    Call("packed heads", 40, 48, B=2, layout=Layout.PACKED, upper=8),
    Call("packed grouped heads, one query", 1, 45, B=2, H=4, group=2, layout=Layout.PACKED),
    Call("rows off 16 bytes", 37, 46, B=2, layout=Layout.SLICED),
    Call("all off 16 bytes", 37, 46, 96, mask="BHTS", bias="BHTS", layout=Layout.SHIFTED),
    Call("expanded keys", 37, 46, B=2, H=3, layout=Layout.EXPANDED),
    Call("columns apart", 37, 46, B=2, mask="BHTS", layout=Layout.TURNED, key_mask=True),
    Call("columns apart, bias", 37, 46, 128, bias="1HTS", layout=Layout.TURNED),
]


def lay_out(t: Tensor, layout: Layout) -> Tensor:
    """The same numbers elsewhere."""
    B, H, T, D = t.shape
    if layout is Layout.PACKED:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout is Layout.SLICED:
        return t.new_empty(B, H, T, D + 8)[..., 4 : 4 + D].copy_(t)
    if layout is Layout.SHIFTED:
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    if layout is Layout.CUT:
        return t.new_empty(B, H, T, D + 1)[..., :D].copy_(t)
    if layout is Layout.TURNED:
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t


def data_of(call: Call) -> tuple[Any, ...]:
    """Arguments of the operator, the same for every schedule."""
    c = call
    sizes = {"B": c.B, "H": c.H, "T": c.T, "S": c.S, "1": 1}
    heads = (1, 1) if c.layout is Layout.EXPANDED else (c.B, c.H // c.group)

    def laid(*shape: int, size: float = 1.0) -> Tensor:
        layout = Layout.DENSE if c.layout is Layout.CUT else c.layout
        return lay_out((size * torch.randn(shape)).to(c.dtype), layout)

    q = laid(c.B, c.H, c.T, c.D, size=c.size)
    k, v = laid(*heads, c.S, c.D, size=c.size), laid(*heads, c.S, c.values)
    if c.layout is Layout.EXPANDED:
        k, v = (t.expand(c.B, c.H, -1, -1) for t in (k, v))
    mask = bias = key_mask = None
    if c.mask:
        mask = torch.rand([sizes[dim] for dim in c.mask]) > 0.3
        mask[..., 1:3, :] = False
        mask[..., 2:3, -1] = True  # the row's first key is the last one
        mask = lay_out(mask, c.layout)
    if c.key_mask:
        key_mask = torch.rand(c.S, c.B).t() > 0.3  # neighbours B apart
        key_mask[2:] = False
    if c.bias:
        bias = torch.randn([sizes[dim] for dim in c.bias]).to(c.bias_dtype)
        if c.hides:
            bias[bias < -0.5] = bias[..., 1:3, :] = float("-inf")
        bias = lay_out(bias, c.layout)
    rng = RNG if c.dropout_p > 0 else None
    scale = c.D**-0.5 if c.scale is None else c.scale
    band = (c.lower, c.upper)
    return (q, k, v, mask, key_mask, bias, rng, *band, scale, c.softcap, c.dropout_p)


def in_fp64(data: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """out and lse of the same inputs."""
    floats = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in data)
    return reference.attention_forward(*floats)  # type: ignore[arg-type]
