"""Calls of ``attention_varlen`` that reach every branch of the CUDA kernels, each with what it is
there for; their inputs; and the formula, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I32, I64 = torch.int32, torch.int64
HEAD_DIMS = (64, 96, 128, 192, 256)
"""Of csrc/kernels/attention_tuning_sm90.h."""


class Layout(Enum):
    """How [N, H, D] lies."""

    DENSE = auto()
    HEADS_FIRST = auto()  # [H, N, D]
    PROJECTION = auto()  # rows far apart, as in a projection to q, k, v and much else
    SHIFTED = auto()  # dense, but from the second element on
    EXPANDED = auto()  # k and v of one head for all, stride 0
    TURNED = auto()  # columns apart


@dataclass(frozen=True)
class Call:
    """One call; ``why`` is what it is there for. Row t of a sequence sees its keys t + d + lower ..
    t + d + upper, with d = S - T ``at_end``.
    """

    why: str
    T: tuple[int, ...]
    S: tuple[int, ...]
    D: int = 64
    Dv: int = 0
    dtype: torch.dtype = BF16
    H: int = 2
    group: int = 1
    lower: int | None = None
    upper: int | None = None
    at_end: bool = False
    scale: float | None = None
    softcap: float = 0.0
    integers: torch.dtype = I32
    layout: Layout = Layout.DENSE
    size: float = 1.0  # of the numbers in q and k

    @property
    def values(self) -> int:
        return self.Dv or self.D

    @property
    def head_dim(self) -> int:
        """The compiled one."""
        return min(dim for dim in HEAD_DIMS if dim >= max(self.D, self.values))

    @property
    def general(self) -> bool:
        small = self.scale is not None and self.scale < torch.finfo(F32).tiny
        return self.softcap > 0.0 or small


RAGGED = (127, 1, 200), (129, 300, 128)
KERNELS = [
    Call(f"{kind}, {name} {D}", *RAGGED, D, dtype=dtype, H=1, **options)
    for D in HEAD_DIMS
    for name, dtype in (("bf16", BF16), ("fp16", F16))
    for kind, options in (
        ("plain", {"upper": 0, "at_end": True}),
        ("general", {"upper": 20, "lower": -150, "softcap": 4.0}),
    )
]
"""Every instantiation, with a group of whole rows, ragged ones, and more tiles than blocks."""
TINY = tuple(i % 4 for i in range(70))
SPARSE = tuple(30 * (i % 250 == 7) for i in range(1100))
CALLS = [
    *KERNELS,
    Call("lengths around an edge of 128", (127, 128, 129, 64, 63), (128, 129, 127, 1, 257), 128),
    Call("the same around 192", (191, 192, 193, 65), (193, 128, 127, 256), H=1, upper=40),
    Call("the same, out in q's place", (127, 128, 129, 65), (112, 113, 111, 224), 192, H=1),
    Call("one sequence", (300,), (300,), 128, upper=0),
    Call("one query each, one block", (1,), (200,), 128, H=1),
    Call("empty ones on both sides", (0, 70, 0, 30, 64, 0), (40, 0, 0, 30, 10, 9), 128, upper=0),
    Call("empty ones, out in q's place", (70, 0, 30, 9), (0, 7, 30, 0), 256, H=1),
    Call("no key at all", (3, 0, 5), (0, 0, 0), 128),
    Call("no query at all", (0, 0), (3, 0), 128),
    Call("no sequence", (), (), 128),
    Call("many tiny ones", TINY, TINY[::-1], H=1, upper=0, at_end=True),
    Call("three rounds of search", SPARSE, SPARSE, 128, H=1, upper=0, integers=I64),
    Call("causal from the end, more keys", (150, 40), (300, 41), 128, upper=0, at_end=True),
    Call("causal from the end, fewer keys", (300, 40), (140, 7), 128, upper=0, at_end=True),
    Call("the same in sequence", (300,), (140,), 192, H=1, upper=0, at_end=True, softcap=9.0),
    Call("causal from the start", (150, 300), (300, 140), 128, upper=0),
    Call("a window", (300, 20), (300, 90), 128, H=1, lower=-100, upper=0),
    Call("a window from the end", (150, 9), (310, 90), 96, lower=-90, upper=30, at_end=True),
    Call("query tiles without a key", (500, 130), (60, 130), 128, lower=-300, upper=-90),
    Call("query tiles without a key, three groups", (500,), (20,), H=1, upper=-280),
    Call("bounds beyond 32 bits hide nothing", (30, 40), (70, 9), lower=-(2**40), upper=2**40),
    Call("a bound that hides everything", (30, 9), (70, 9), 128, H=1, lower=2**40),
    Call("four heads of one", (140, 30), (200, 77), 128, H=4, group=4, upper=0, at_end=True),
    Call("pairs of heads", (140, 30), (200, 77), H=4, group=2),
    Call("wider v", (140, 9), (200, 33), 40, 128, F16),
    Call("narrower v", (140, 9), (200, 33), 200, 8, upper=0),
    Call("slabs of 32 columns", (140, 9), (200, 33), 88, 96, upper=60),
    Call("8 columns", (70, 9), (33, 70), 8),
    Call("negative scale", (70, 9), (33, 70), scale=-0.3),
    Call("scale 0", (70, 9), (33, 70), 96, scale=0.0),
    Call("bounds in int64", (70, 9), (33, 70), integers=I64),
    Call("heads first", (70, 90), (133, 70), 128, layout=Layout.HEADS_FIRST, upper=0),
    Call("rows of a projection", (70, 90), (133, 70), 128, layout=Layout.PROJECTION),
    Call("off 16 bytes", (70, 9), (33, 70), layout=Layout.SHIFTED),
    Call("expanded heads", (70, 9), (33, 70), H=4, layout=Layout.EXPANDED),
    Call("columns apart", (70, 9), (33, 70), layout=Layout.TURNED),
    Call("maxima that grow from tile to tile", (130, 9), (600, 300), 128, H=1, size=3.0),
    Call("scores of 1e9, fp16", (130, 9), (300, 70), 128, dtype=F16, size=1.2e4, H=1),
]


LONG = [
    Call("long ones", (5000, 300, 9000, 1), (5000, 300, 9000, 1), 128, H=4, group=4, upper=0),
    Call("hundreds", (97,) * 300, (97,) * 300, 64, H=4, upper=0, at_end=True),
]
"""For a GPU: more tiles than its multiprocessors take at once."""
POISONED = [
    Call(why, (70, 129, 33, 0, 64), (50, 140, 1, 9, 128), D, H=1, **options)
    for why, D, options in (
        ("NaN beside", 128, {}),
        ("NaN beside, three groups", 64, {"upper": 0, "at_end": True}),
        ("NaN beside, out in q's place", 192, {"lower": -40}),
        ("NaN beside, in sequence", 256, {"softcap": 4.0}),
        ("NaN beside, slabs of 32 columns", 96, {"softcap": 4.0, "upper": 7}),
    )
]
"""Sequences of which some are to hold anything."""


ANY_BOUNDS = [
    ([-(2**40), 30, 2**40], [0, 2**40, -7]),
    ([200, 230, 0, 90], [130, 150, 20, 77]),
    ([300, 300, 300], [300, 0, 10]),
    ([0, 20, 20], [0, 20, 20]),
]
"""Of 300 queries and 200 keys, hardly any as they should be."""
LANES = 32
"""Of a warp, which looks for a tile's sequence."""


def bounds_of(lengths: tuple[int, ...], dtype: torch.dtype = I32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def sought(bounds: list[int], tile: int, block_t: int) -> tuple[int, int]:
    """The sequence of a virtual tile, and how many bounds a warp reads until it knows."""
    first, count, read = 0, len(bounds) - 1, 0
    while count > 1:
        step = -(-count // LANES)
        parts = [lane * step for lane in range(LANES) if lane * step < count]
        last = max(p for p in parts if p == 0 or bounds[first + p] // block_t + first + p <= tile)
        read += len(parts)
        first, count = first + last, min(step, count - last)
    return first, read


def lay_out(t: Tensor, layout: Layout) -> Tensor:
    """The same numbers elsewhere."""
    N, H, D = t.shape
    if layout is Layout.HEADS_FIRST:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout is Layout.PROJECTION:
        return t.new_empty(N, 3 * H * D + 4096)[:, H * D : 2 * H * D].view_as(t).copy_(t)
    if layout is Layout.SHIFTED:
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    if layout is Layout.TURNED:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t


def data_of(call: Call) -> tuple[Any, ...]:
    """Arguments of the operator, the same for every schedule."""
    c, N, M = call, sum(call.T), sum(call.S)
    heads = 1 if c.layout is Layout.EXPANDED else c.H // c.group

    def laid(rows: int, heads: int, columns: int, size: float = 1.0) -> Tensor:
        return lay_out((size * torch.randn(rows, heads, columns)).to(c.dtype), c.layout)

    q, k, v = laid(N, c.H, c.D, c.size), laid(M, heads, c.D, c.size), laid(M, heads, c.values)
    if c.layout is Layout.EXPANDED:
        k, v = (t.expand(-1, c.H, -1) for t in (k, v))
    scale = c.D**-0.5 if c.scale is None else c.scale
    bounds = (bounds_of(c.T, c.integers), bounds_of(c.S, c.integers))
    return (q, k, v, *bounds, c.lower, c.upper, c.at_end, scale, c.softcap)


def visible(
    T: int, S: int, lower: int | None, upper: int | None, at_end: bool, device: Any = None
) -> Tensor:
    """bool [T, S] of one sequence."""
    ahead = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None]
    ahead = ahead - (S - T if at_end else 0)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if lower is not None:
        seen &= ahead >= lower
    if upper is not None:
        seen &= ahead <= upper
    return seen


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lower: int | None,
    upper: int | None,
    at_end: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out and lse in fp64."""
    outputs, statistics, group = [], [], q.shape[1] // max(k.shape[1], 1)
    for i in range(len(cu_seqlens_q) - 1):
        rows = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].double()
        keys, values = (t[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].double() for t in (k, v))
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        score = scale * torch.einsum("thd,shd->hts", rows, keys)
        score = softcap * torch.tanh(score / softcap) if softcap else score
        seen = visible(len(rows), len(keys), lower, upper, at_end, q.device)
        score = score.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(score, -1)
        P = torch.exp(score - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
        outputs.append(torch.einsum("hts,shd->thd", P, values))
        statistics.append(lse)
    empty = q.new_empty(0, q.shape[1], v.shape[2], dtype=torch.float64)
    return torch.cat([empty, *outputs]), torch.cat([empty[..., 0].T, *statistics], 1)


def span_of(lengths: tuple[int, ...], i: int) -> tuple[int, int]:
    """Where sequence i begins and ends."""
    return sum(lengths[:i]), sum(lengths[: i + 1])


def check_neighbours(run: Callable[..., Sequence[Tensor]], call: Call) -> None:
    """Whatever the other sequences hold, a sequence keeps its bits."""
    q, k, v, *rest = data_of(call)
    clean = run(q, k, v, *rest)
    left = torch.ones(sum(call.T), dtype=torch.bool)
    for i, poison in ((1, float("inf")), (2, float("nan")), (4, float("nan"))):
        rows, keys = slice(*span_of(call.T, i)), slice(*span_of(call.S, i))
        q[rows], k[keys], v[keys], left[rows] = poison, poison, poison, False
    out, lse = run(q, k, v, *rest)
    assert left.any() and torch.equal(out[left], clean[0][left])
    assert torch.equal(lse[:, left], clean[1][:, left])
    assert not out[~left].isfinite().all()
