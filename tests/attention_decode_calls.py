"""Calls of ``attention_decode`` that reach every branch of the CUDA kernels, each with what it is
there for; their inputs; and the formula, one sequence and one key at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.attention_calls import Layout, lay_out

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I32, I64 = torch.int32, torch.int64
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Of csrc/kernels/attention_tuning.h."""
NOWHERE = (-1, 10**6)
"""What stands in a table behind a sequence's end."""


@dataclass(frozen=True)
class Call:
    """One call; ``why`` is what it is there for. A page of 0 is a contiguous cache; row t sees keys
    n - T + t + lower .. n - T + t + upper of n.
    """

    why: str
    lens: tuple[int, ...]
    S: int
    D: int = 64
    Dv: int = 0
    T: int = 1
    H: int = 2
    group: int = 1
    page: int = 0
    dtype: torch.dtype = BF16
    lower: int | None = None
    upper: int | None = 0
    scale: float | None = None
    softcap: float = 0.0
    integers: torch.dtype = I32
    layout: Layout = Layout.DENSE
    size: float = 1.0  # of the numbers in q and k

    @property
    def B(self) -> int:
        return len(self.lens)

    @property
    def values(self) -> int:
        return self.Dv or self.D

    @property
    def head_dim(self) -> int:
        """The compiled one."""
        return min(dim for dim in HEAD_DIMS if dim >= max(self.D, self.values))

    @property
    def blocks(self) -> int:
        """Of a sequence's table."""
        return -(-self.S // self.page)


KERNELS = [
    Call(f"{where}, {name} {D}", lens, S, D, dtype=dtype, H=4, group=2, **options)
    for D in HEAD_DIMS
    for name, dtype in (("bf16", BF16), ("fp16", F16))
    for where, lens, S, options in (
        ("one part", (70, 41), 80, {}),
        ("parts, paged", (1100,), 1200, {"page": 16, "T": 3}),
    )
]
"""Every instantiation: two tiles per warp or more, and splits."""
CALLS = [
    *KERNELS,
    Call("one key", (1,), 1, 8),
    Call("no key at all", (0, 0), 0, 8),
    Call("sequences without a key, and all lengths", (0, 1, 33, 64, 200, -5), 100, 128),
    Call("more queries than keys", (3, 0), 40, T=9, H=2),
    Call("no query", (4,), 9, T=0),
    Call("no sequence", (), 9),
    Call("parts without a key", (20, 0), 2100, 128, H=1),
    Call("a part that some rows see alone", (1030,), 2048, H=4, group=4, T=5, lower=-500),
    Call("eight heads of one key head", (90,), 96, 128, H=8, group=8),
    Call("rows of several tiles", (300,), 300, 80, T=9, H=6, group=3),
    Call("rows of several tiles, and parts", (520,), 560, 256, T=9, H=2, group=2),
    Call("five queries of three heads, ragged", (77, 5), 80, 96, T=5, H=3, group=3),
    Call("window", (200, 30), 200, lower=-20, T=3),
    Call("window, in parts", (1900,), 2048, 128, H=1, lower=-700, T=2),
    Call("not causal", (50, 40), 64, T=4, upper=None),
    Call("a window to both sides", (90,), 96, T=6, lower=-5, upper=2),
    Call("bounds beyond 32 bits hide nothing", (60,), 64, lower=-(2**40), upper=2**40),
    Call("a bound that hides everything", (60,), 64, lower=2**40),
    Call("softcap", (90,), 96, 128, softcap=0.7),
    Call("scale 0", (90,), 96, scale=0.0),
    Call("negative scale", (90,), 96, scale=-0.3),
    Call("wider v", (70,), 77, 40, 72, dtype=F16),
    Call("narrower v", (70,), 77, 200, 8),
    Call("no compiled head dim", (70,), 77, 136),
    Call("pages of 1 row", (40, 17), 48, page=1),
    Call("pages of 7 rows", (90, 3), 100, 80, page=7, T=2, H=4, group=4),
    Call("pages of 64 rows, int64", (200, 100), 256, 128, page=64, integers=I64),
    Call("lengths beyond the cache", (500, 2**31 - 1), 100, 32),
    Call("lengths beyond the cache, int64, paged", (2**40, 20), 96, page=32, integers=I64),
    Call("many tiles: rounding must not add up in the sums", (4000,), 4096, 32, H=1, scale=2.0),
    Call("scores of 1e9, whose last bits are 2^64", (600,), 640, 128, dtype=F16, size=1.2e4),
    Call("packed heads", (40, 30), 48, layout=Layout.PACKED, T=2, H=4, group=2),
    Call("rows off 16 bytes", (37, 40), 46, layout=Layout.SLICED),
    Call("columns apart", (37, 40), 46, layout=Layout.TURNED, T=2),
    Call("packed pages", (37, 40), 48, page=8, layout=Layout.PACKED),
]


LONG = [
    Call("long, in many parts", (20000,), 20480, 128, H=8, group=8),
    Call("long, in many parts, paged", (20000, 700), 20480, 64, H=2, page=64, T=2),
]
"""For a GPU: what its multiprocessors make of the number of parts is not what the harness' do."""


def data_of(call: Call) -> tuple[Any, ...]:
    """Arguments of the operator, the same for every schedule: NaN where no key is, and blocks in a
    random order.
    """
    c, heads = call, call.H // call.group
    q = lay_out((c.size * torch.randn(c.B, c.H, c.T, c.D)).to(c.dtype), c.layout)
    k = (c.size * torch.randn(c.B, heads, c.S, c.D)).to(c.dtype)
    v = torch.randn(c.B, heads, c.S, c.values).to(c.dtype)
    for b, length in enumerate(c.lens):
        k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = float("nan")
    lens, table = torch.tensor(c.lens, dtype=c.integers), None
    if c.page:
        k, v, table = _paged(c, k, v)
    caches = (lay_out(k, c.layout), lay_out(v, c.layout))
    scale = c.D**-0.5 if c.scale is None else c.scale
    return (q, *caches, lens, table, c.lower, c.upper, scale, c.softcap)


def _paged(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three blocks more than are used, and the table of those that are."""
    c = call
    blocks = c.B * c.blocks + 3
    order = torch.randperm(blocks)[: c.B * c.blocks].view(c.B, c.blocks)
    pages = []
    for t in (k, v):
        padding = c.blocks * c.page - c.S
        padded = torch.nn.functional.pad(t, (0, 0, 0, padding), value=float("nan"))
        cache = t.new_full((blocks, t.shape[1], c.page, t.shape[3]), float("nan"))
        cache[order] = padded.unflatten(2, (c.blocks, c.page)).transpose(1, 2)
        pages.append(cache)
    table = order.to(c.integers)
    for b, length in enumerate(c.lens):
        used = -(-min(max(length, 0), c.S) // c.page)
        table[b, used::2], table[b, used + 1 :: 2] = NOWHERE
    return pages[0], pages[1], table


def formula(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    block_table: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out and lse in fp64: of each sequence the keys that there are, then exp and sums."""
    B, H, T, _ = q.shape
    out = torch.zeros(B, H, T, v_cache.shape[3], dtype=torch.float64)
    lse = torch.full((B, H, T), float("-inf"), dtype=torch.float64)
    for b in range(B):
        k, v = (_keys_of(b, cache, cache_lens, block_table) for cache in (k_cache, v_cache))
        length, group = k.shape[1], H // k.shape[0]
        for t in range(T):
            place = length - T + t
            first = 0 if lower is None else max(0, place + lower)
            end = length if upper is None else min(length, place + upper + 1)
            if first >= end:
                continue
            for h in range(H):
                score = scale * (k[h // group, first:end] @ q[b, h, t].double())
                score = softcap * torch.tanh(score / softcap) if softcap else score
                lse[b, h, t] = torch.logsumexp(score, 0)
                out[b, h, t] = torch.softmax(score, 0) @ v[h // group, first:end]
    return out, lse


def _keys_of(b: int, cache: Tensor, cache_lens: Tensor, block_table: Tensor | None) -> Tensor:
    """[Hkv, n, D] of sequence b, in fp64."""
    if block_table is None:
        length = min(max(int(cache_lens[b]), 0), cache.shape[2])
        return cache[b, :, :length].double()
    size = cache.shape[2]
    length = min(max(int(cache_lens[b]), 0), size * block_table.shape[1])
    rows = [cache[int(block_table[b, s // size]), :, s % size] for s in range(length)]
    empty = cache.new_zeros(cache.shape[1], 0, cache.shape[3])
    return (torch.stack(rows, 1) if rows else empty).double()
