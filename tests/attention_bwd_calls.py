"""Attentions whose gradients reach every branch of the CUDA kernels, each with what it is there
for, their inputs and right results: a table for the harness' tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from fused_lm.reference import attention as reference
from tests import attention_calls
from tests.attention_calls import (
    ALONE,
    BF16,
    F16,
    F32,
    HEAD_DIMS,
    MEDIUM,
    OF_EACH_HEAD,
    Layout,
    data_of,
)

JOINT_HEAD_DIM = 128
"""Up to which one launch makes dk and dv, of csrc/kernels/attention_tuning.h."""
TEAM_HEAD_DIMS = (96, 128, 192, 256)


class Dout(Enum):
    """How the gradient of out lies."""

    DENSE = auto()
    ONE_NUMBER = auto()  # every stride 0, as the gradient of a sum
    ONE_ROW = auto()  # the same for all queries
    ONE_HEAD = auto()  # the same for all heads and batches
    PACKED = auto()  # [B, T, H, Dv]
    TURNED = auto()  # the last two dims exchanged in memory


@dataclass(frozen=True)
class Call(attention_calls.Call):
    """An attention, and what its backward is given and asked."""

    dlse: bool = True
    dout: Dout = Dout.DENSE
    needs_dbias: bool = True


FEATURES: dict[str, Any] = {
    "mask": "11TS",
    "key_mask": True,
    "bias": "11TS",
    "scale": 0.2,
    "softcap": 2.0,
    "dropout_p": 0.3,
}
KERNELS = [
    Call(f"{name}, {type_name} {D}", 40, 70, D, dtype=dtype, H=1, upper=50, **features)
    for D in HEAD_DIMS
    for type_name, dtype in attention_calls.DTYPES.items()
    for name, features in (("plain", {}), ("general", FEATURES))
] + [
    Call(
        f"{name} {where}, {type_name} {D}",
        *(40, 70, D),
        dtype=dtype,
        H=1,
        upper=50,
        **features,
        **shared,
    )
    for D in TEAM_HEAD_DIMS
    for type_name, dtype in attention_calls.DTYPES.items()
    for name, features in (("plain", {}), ("general", FEATURES))
    for where, shared in (("without teams", ALONE), ("on an A100", MEDIUM))
    if not (D > JOINT_HEAD_DIM and name == "plain" and shared is ALONE)  # the general ones run
]
"""Every instantiation."""
BIASES = [
    Call(
        f"bias of {shape} in {dtype}",
        *(65, 65 + t % 4, 8),
        B=2,
        bias=shape,
        bias_dtype=dtype,
        dlse=False,
    )
    for t, (shape, dtype) in enumerate(
        zip(
            ("".join(dims) for dims in itertools.product("B1", "H1", "T1", "S1")),
            itertools.cycle((F32, BF16, F16)),
            strict=False,
        )
    )
]
CALLS = [
    *KERNELS,
    *BIASES,
    Call("full tiles alone", 128, 128, dlse=False),
    Call("both ends ragged", 150, 77, 32, B=2, dout=Dout.PACKED),
    Call("one query", 1, 70, 128, H=1),
    Call("one query and one key", 1, 1, 8, bias="11TS"),
    Call("no key", 37, 0, 192, bias="1HT1"),
    Call("no query", 0, 5, bias="1H1S"),
    Call("no batch", 4, 5, B=0),
    Call("causal", 150, 150, 32, upper=0, dout=Dout.ONE_NUMBER),
    Call("causal, key tiles that nobody sees", 40, 200, H=1, upper=0),
    Call("causal, query tiles without a key", 140, 20, 96, H=1, upper=-120, bias="1HTS"),
    Call("the same, plain", 200, 20, H=1, upper=-180),
    Call("narrow window", 150, 150, 96, H=1, lower=-20, upper=5),
    Call("narrow window, bias of rows", 150, 150, 8, H=1, lower=-20, upper=5, bias="1HT1"),
    Call("whole tiles between those of both edges", 300, 300, 32, H=1, lower=-200, upper=64),
    Call("a bound that hides everything", 30, 64, 32, lower=2**40, bias="11TS"),
    Call("grouped heads", 70, 45, 32, H=6, group=3, B=2, upper=8, dout=Dout.ONE_HEAD),
    Call("one key head, in parts", 37, 45, 192, H=4, group=4, dout=Dout.ONE_ROW),
    Call("one key head, in parts without teams", 37, 45, 192, H=4, group=4, **ALONE),
    Call("grouped heads, wide teams", 100, 150, 200, H=2, group=2, lower=-40, upper=70),
    Call("grouped heads, few wide teams", 100, 150, 256, H=2, group=2, upper=0, **MEDIUM),
    Call("teams with features of each head", 70, 104, 128, H=4, needs_dbias=False, **OF_EACH_HEAD),
    Call("the same on an A100", 70, 56, 192, needs_dbias=False, **OF_EACH_HEAD, **MEDIUM),
    Call("the same, joint", 100, 70, 128, needs_dbias=False, **OF_EACH_HEAD, **MEDIUM),
    Call(
        "the same, joint, of 96 columns", 100, 70, 96, needs_dbias=False, **OF_EACH_HEAD, **MEDIUM
    ),
    Call("the same, of 256 columns", 100, 72, 256, needs_dbias=False, **OF_EACH_HEAD, **MEDIUM),
    Call("the same on an H100", 100, 72, 256, needs_dbias=False, **OF_EACH_HEAD),
    Call("the same without teams", 70, 104, 128, **OF_EACH_HEAD, **ALONE),
    Call(
        "the same without teams, in parts", 70, 56, 192, needs_dbias=False, **OF_EACH_HEAD, **ALONE
    ),
    Call("large joint teams, several tiles", 150, 140, 96, H=2, group=2, upper=0, **MEDIUM),
    Call("the same of 128 columns", 150, 140, 128, H=2, group=2, upper=0, **MEDIUM),
    Call("teams with an fp32 bias", 70, 104, 128, H=1, bias="11TS", bias_dtype=F32),
    Call("wide teams with an fp32 bias", 70, 104, 192, H=1, bias="11TS", bias_dtype=F32),
    Call("a bias of -inf, here and there and all over a row", 37, 70, bias="BHTS", hides=True),
    Call("the same in teams", 70, 104, 192, H=1, bias="11TS", hides=True),
    Call("wide teams, tiles that nobody sees", 100, 400, 192, H=1, upper=0),
    Call("wide teams, queries without a key", 300, 100, 192, H=1, upper=-150),
    Call("wide teams, no key that is seen", 64, 128, 192, H=1, lower=2**40),
    Call("wider v", 37, 45, 40, 72, F16, bias="1HTS"),
    Call("narrower v, in parts", 37, 45, 200, 8, H=1),
    Call("columns of a slice and some", 37, 45, 72, 136, bias="1HTS", bias_dtype=F32),
    Call("key mask, one batch without any", 37, 70, B=3, key_mask=True, dout=Dout.TURNED),
    Call("mask of queries", 37, 46, mask="1HT1", dlse=False),
    Call("mask in octets", 37, 104, B=2, mask="BHTS", dlse=False),
    Call("mask in octets, wide teams", 37, 72, 192, H=1, mask="11TS"),
    Call("mask in octets, joint teams", 70, 104, 96, H=1, mask="11TS"),
    Call("bias in fp16 pairs, wide teams", 70, 46, 192, dtype=F16, bias="1HTS", bias_dtype=F16),
    Call("bias in bf16, odd", 37, 45, 128, bias="1HTS", needs_dbias=False),
    Call("softcap", 37, 45, 128, H=1, softcap=0.7),
    Call("softcap and its bias", 37, 45, 32, softcap=0.7, bias="1HTS"),
    Call("dropout over several tiles", 70, 100, 32, B=2, dropout_p=0.3, upper=0),
    Call("dropout and the bias", 70, 100, 32, dropout_p=0.3, bias="BHTS", bias_dtype=F32),
    Call("everything dropped", 37, 45, 192, H=1, dropout_p=1.0, bias="11TS"),
    Call("scores of 1e5", 37, 70, size=300.0, bias="11TS"),
    Call("negative scale", 37, 45, scale=-0.3),
    Call("scale 0", 37, 45, 96, scale=0.0),
    Call("scale below the normal numbers", 37, 45, scale=1e-40),
    Call("bias that needs no gradient", 37, 46, bias="1HTS", needs_dbias=False),
    Call(
        "every feature",
        *(100, 78, 64, 32, F16),
        H=4,
        group=2,
        lower=-90,
        upper=30,
        **{**FEATURES, "bias": "1HTS", "bias_dtype": F32},
        layout=Layout.PACKED,
        dout=Dout.PACKED,
    ),
    Call("rows off 16 bytes", 37, 46, B=2, layout=Layout.SLICED),
    Call("all off 16 bytes", 37, 46, 96, mask="BHTS", bias="BHTS", layout=Layout.SHIFTED),
    Call("expanded keys", 37, 46, B=2, H=3, layout=Layout.EXPANDED),
    Call("columns apart", 37, 46, mask="1HTS", bias="1HTS", layout=Layout.TURNED),
]


def dout_of(call: Call) -> Tensor:
    B, H, T, Dv = call.B, call.H, call.T, call.values
    shape, order = {
        Dout.DENSE: ((B, H, T, Dv), (0, 1, 2, 3)),
        Dout.ONE_NUMBER: ((1, 1, 1, 1), (0, 1, 2, 3)),
        Dout.ONE_ROW: ((B, H, 1, Dv), (0, 1, 2, 3)),
        Dout.ONE_HEAD: ((1, 1, T, Dv), (0, 1, 2, 3)),
        Dout.PACKED: ((B, T, H, Dv), (0, 2, 1, 3)),
        Dout.TURNED: ((B, H, Dv, T), (0, 1, 3, 2)),
    }[call.dout]
    return torch.randn(shape).to(call.dtype).permute(order).expand(B, H, T, Dv)


@dataclass
class Data:
    """Arguments of the operator, the same for every schedule, and what they give."""

    arguments: tuple[Any, ...]
    same: Sequence[Tensor]
    exact: Sequence[Tensor]
    shared_bytes: int

    @classmethod
    def of(cls, call: Call) -> Data:
        forward = data_of(call)
        dlse = torch.randn(call.B, call.H, call.T) if call.dlse else None
        if dlse is not None and call.dout is Dout.ONE_NUMBER:
            dlse = torch.randn(()).expand(call.B, call.H, call.T)
        dout = dout_of(call)

        def arguments(score: tuple[Any, ...]) -> tuple[Any, ...]:
            results = reference.attention_forward(*score)
            return (*score[:3], *results, *score[3:], call.needs_dbias)

        own = (dout, dlse, *arguments(forward))
        exact = (*_wide((dout, dlse)), *arguments(_wide(forward)))
        same, right = (reference.attention_backward(*each) for each in (own, exact))
        return cls(own, same, right, call.shared_bytes)


def _wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating-point tensors in fp64."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
