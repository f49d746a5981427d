"""Calls of the backward of ``attention_varlen`` that reach every branch of the packed Hopper
backward, whose tiles are others than the forward's; their inputs, and what they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lm.reference import attention_varlen as reference
from tests.attention_varlen_calls import (
    F16,
    KERNELS,
    SPARSE,
    TINY,
    Call,
    Layout,
    data_of,
    lay_out,
)

CALLS = [
    *KERNELS,
    Call("lengths around an edge of 64", (63, 64, 65, 128), (129, 128, 127, 63), 128),
    Call("the same of 64 columns", (127, 128, 129, 1), (65, 64, 128, 1), H=1, upper=40),
    Call("the same of 96 columns", (95, 96, 97, 192), (128, 129, 64, 1), 96, H=1),
    Call("the same of 256 columns", (127, 128, 129), (65, 64, 63), 256, H=1, upper=40),
    Call("one sequence", (300,), (300,), 128, upper=0),
    Call("one query each", (1, 1), (200, 1), 128, H=1),
    Call("empty ones on both sides", (0, 70, 0, 30, 64, 0), (40, 0, 0, 30, 10, 9), 128, upper=0),
    Call("empty ones on both sides, wide", (70, 0, 30, 9), (0, 7, 30, 0), 256, H=1),
    Call("no key at all", (3, 0, 5), (0, 0, 0), 128),
    Call("no query at all", (0, 0), (3, 0), 128),
    Call("no sequence", (), (), 128),
    Call("many tiny ones", TINY, TINY[::-1], H=1, upper=0, at_end=True),
    Call("three rounds of search", SPARSE, SPARSE, 128, H=1, upper=0, integers=torch.int64),
    Call("causal from the end, more keys", (150, 40), (300, 41), 128, upper=0, at_end=True),
    Call("causal from the end, fewer keys", (300, 40), (140, 7), 128, upper=0, at_end=True),
    Call("causal from the start, wide", (150, 300), (300, 140), 192, H=1, upper=0),
    Call("a window", (300, 20), (300, 90), 128, H=1, lower=-100, upper=0),
    Call("a window from the end", (150, 9), (310, 90), 96, lower=-90, upper=30, at_end=True),
    Call("key tiles that no query sees", (100, 30), (500, 300), H=1, upper=0),
    Call("the same with a softcap", (100, 30), (500, 300), H=1, upper=0, softcap=4.0),
    Call("queries without a key", (500, 130), (60, 130), 128, lower=-300, upper=-90),
    Call("a bound that hides everything", (30, 9), (70, 9), 128, H=1, lower=2**40),
    Call("four heads of one", (140, 30), (200, 77), 128, H=4, group=4, upper=0, at_end=True),
    Call("pairs of heads, wide", (140, 30), (200, 77), 192, H=4, group=2),
    Call("pairs of heads, softcap", (140, 30), (200, 77), H=4, group=2, softcap=3.0),
    Call("wider v", (140, 9), (200, 33), 40, 128, F16),
    Call("narrower v", (140, 9), (100, 33), 200, 8, upper=0),
    Call("slabs of 32 columns", (140, 9), (200, 33), 88, 96, upper=60),
    Call("8 columns", (70, 9), (33, 70), 8),
    Call("negative scale", (70, 9), (33, 70), scale=-0.3),
    Call("scale 0", (70, 9), (33, 70), 96, scale=0.0),
    Call("heads first", (70, 90), (133, 70), 128, layout=Layout.HEADS_FIRST, upper=0),
    Call("rows of a projection", (70, 90), (133, 70), 128, layout=Layout.PROJECTION),
    Call("off 16 bytes", (70, 9), (33, 70), layout=Layout.SHIFTED),
    Call("expanded heads", (70, 9), (33, 70), H=4, layout=Layout.EXPANDED),
    Call("columns apart", (70, 9), (33, 70), layout=Layout.TURNED),
    Call("scores of 1e5", (130, 9), (200, 70), 128, H=1, size=300.0),
]


@dataclass
class Data:
    """Arguments of the operator, the same for every schedule, and what they give."""

    arguments: tuple[Any, ...]
    same: Sequence[Tensor]
    exact: Sequence[Tensor]

    @classmethod
    def of(cls, call: Call) -> Data:
        forward = data_of(call)
        N = sum(call.T)
        dout = lay_out(torch.randn(N, call.H, call.values).to(call.dtype), call.layout)
        dlse = torch.randn(call.H, N) if len(call.T) % 2 else None
        own = backward_arguments(dout, dlse, forward)
        exact = backward_arguments(*_wide((dout, dlse)), _wide(forward))
        same, right = (reference.attention_varlen_backward(*each) for each in (own, exact))
        return cls(own, same, right)


def backward_arguments(
    dout: Tensor, dlse: Tensor | None, forward: tuple[Any, ...]
) -> tuple[Any, ...]:
    """From those of a forward."""
    return (dout, dlse, *forward[:3], *reference.attention_varlen_forward(*forward), *forward[3:])


def _wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating-point tensors in fp64."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
