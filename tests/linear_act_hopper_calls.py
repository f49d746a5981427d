"""Linear layers that reach every branch of Hopper's products, each with what it is there for: a
table for the harness' tests. The harness has few multiprocessors, by which schedules are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_lm.reference import linear_act as reference
from fused_lm.reference.activations import GATES, PLAIN
from fused_lm.reference.ffn import ffn_dpre
from fused_lm.tolerance import check_close

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"bf16": BF16, "fp16": F16}
ACTIVATIONS = ("none", *PLAIN, *GATES)
LINEAR, ACTIVATION, GRADIENT, GATED = "linear", "activation", "gradient", "gated"
"""Work of csrc/kernels/gemm_tuning_sm90.h."""


@dataclass(frozen=True)
class Call:
    """x [N, C], F outputs, of twice as many pre-activations if gated; ``why`` is what it is there
    for.
    """

    why: str
    N: int
    C: int
    F: int
    activation: str = "none"
    dtype: torch.dtype = BF16
    transposed: bool = False
    bias: bool = True
    keep_pre: bool = False
    total: torch.dtype | None = None
    scale: float = 1.0
    sms: int = 2
    """Multiprocessors of the harness."""

    @property
    def parts(self) -> int:
        return 2 if self.activation in GATES else 1

    @property
    def work(self) -> str:
        if self.activation in GATES:
            return GATED
        return ACTIVATION if self.activation != "none" or self.keep_pre else LINEAR


@dataclass(frozen=True)
class Data:
    """The tensors of a call, and what they lead to."""

    call: Call
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor

    @classmethod
    def of(cls, call: Call) -> Data:
        make = torch.Generator().manual_seed(sum(map(ord, call.why)))

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        width = call.parts * call.F
        shape = (call.C, width) if call.transposed else (width, call.C)
        return cls(
            call,
            (drawn(call.N, call.C) * call.scale).to(call.dtype),
            (drawn(*shape) * call.C**-0.5).to(call.dtype),
            drawn(width).to(call.dtype) if call.bias else None,
            drawn(call.N, call.F).to(call.dtype),
        )

    @property
    def dpre(self) -> tuple[Any, ...]:
        """Back through a second layer, of which dy is the gradient of x: [N, C] -> [N, F]."""
        call = self.call
        weight = self.weight[:, : call.F] if call.transposed else self.weight[: call.F]
        weight = weight.T.contiguous()
        return self.x, weight, self.saved(), call.activation, call.transposed, call.bias

    @property
    def forward(self) -> tuple[Any, ...]:
        call = self.call
        return (
            self.x, self.weight, self.bias, None, call.activation, call.transposed, call.keep_pre,
        )  # fmt: skip

    def backward(self, pre: Tensor) -> tuple[Any, ...]:
        """All gradients; for relu ``pre`` is the output."""
        call = self.call
        return (
            self.dy, self.x, self.weight, self.bias, pre, call.activation, call.transposed, True,
            call.bias, True,
        )  # fmt: skip

    def in_fp64(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)

    def saved(self) -> Tensor:
        """What a forward leaves to the backward."""
        pre = replace(self, call=replace(self.call, keep_pre=True)).forward
        y, kept = reference.linear_act_forward(*pre)
        return y if self.call.activation == "relu" else kept


def total_of(data: Data) -> Tensor:
    """What a weight's gradient is added to, with rows apart from each other."""
    rows, columns = data.weight.shape
    values = torch.linspace(-9, 9, rows * (columns + 8)).view(rows, -1)
    return values[:, :columns].to(data.call.total)


def check_forward(data: Data, y: Tensor, pre: Tensor) -> None:
    """Also that y is what a kept pre gives."""
    call = data.call
    same = reference.linear_act_forward(*data.forward)
    exact = reference.linear_act_forward(*data.in_fp64(data.forward))
    check_close(y, same[0], exact[0].to(call.dtype).double(), "y")
    check_close(pre, same[1], exact[1], "pre")
    if call.keep_pre:
        again = reference.activate(pre.float(), call.activation).to(call.dtype)
        check_close(y, again, reference.activate(pre.double(), call.activation), "y of its pre")


def check_backward(data: Data, found: Sequence[Tensor]) -> None:
    """dx, dweight or the total that it was added to, dbias."""
    arguments = data.backward(data.saved())
    same = list(reference.linear_act_backward(*arguments))
    exact = list(reference.linear_act_backward(*data.in_fp64(arguments)))
    if data.call.total is not None:
        before = total_of(data)
        same[1] = (before.float() + same[1].float()).to(data.call.total)
        exact[1] = before.double() + exact[1]
    for name, *each in zip(("dx", "dweight", "dbias"), found, same, exact, strict=True):
        check_close(*each, name)


def check_dpre(data: Data, found: Sequence[Tensor]) -> None:
    same, exact = (ffn_dpre(*each) for each in (data.dpre, data.in_fp64(data.dpre)))
    for name, *each in zip(("dpre", "dbias"), found, same, exact, strict=True):
        check_close(*each, name)


KINDS = [
    Call("cooperative", 200, 200, 504),
    Call("cooperative, turned weight", 200, 200, 504, transposed=True),
    Call("ping-pong 192", 520, 264, 184, "silu", keep_pre=True),
    Call("ping-pong 192, turned weight", 520, 264, 184, "gelu_tanh", transposed=True),
    Call("ping-pong 128", 390, 328, 120, "gelu", keep_pre=True),
    Call("ping-pong 128, turned weight", 390, 328, 120, "relu_squared", transposed=True),
    Call("gated", 390, 328, 200, "swiglu", keep_pre=True),
    Call("gated, turned weight", 390, 264, 184, "geglu", transposed=True),
]
"""Each forward kernel, with several tiles, more steps of K than stages or fewer, all ragged."""
INSTANTIATIONS = [
    replace(call, why=f"{call.why}, {name}", dtype=dtype)
    for call in KINDS
    for name, dtype in DTYPES.items()
]
SHARED = [
    *(
        Call(
            f"shared, {name}{turned}", 40, 1000, 72, "gelu", dtype, transposed, keep_pre=True, sms=8
        )
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    Call("shared, a linear layer", 40, 1000, 72, sms=8),
    Call("shared, two tiles, no bias", 200, 1200, 40, "relu", bias=False, sms=12),
    Call("shared, two columns of tiles, nothing kept", 20, 1200, 296, "silu", sms=12),
    Call("shared, a step each", 8, 1600, 8, sms=64),
    Call("whole tiles, and two that are shared", 1280, 1504, 136, sms=8),
    Call("gated, two columns of tiles are shared", 20, 1200, 200, "geglu_tanh", bias=False, sms=12),
    Call("gated, whole tiles, and two that are shared", 1280, 1504, 72, "swiglu", sms=8),
]
"""By all blocks."""
SHARED_GATED = [
    Call(f"shared, gated, {name}", 40, 1000, 72, "swiglu", dtype, keep_pre=True, sms=8)
    for name, dtype in DTYPES.items()
]
SHARED_BACK_THROUGH = [
    *(
        Call(f"shared, back through, {name}{turned}", 40, 704, 72, "silu", dtype, transposed, sms=8)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    Call("shared, back through, two tiles, no sums", 200, 1000, 40, "gelu", bias=False, sms=12),
    *(
        Call(f"shared, back through gates, {name}", 40, 704, 72, "swiglu", dtype, sms=8)
        for name, dtype in DTYPES.items()
    ),
]
SHARED_BACKWARDS = [
    *(
        Call(f"shared, gradients, {name}{added}", 1000, 72, 40, "silu", dtype, total=total, sms=8)
        for name, dtype in DTYPES.items()
        for added, total in (("", None), (", added into fp32", F32))
    ),
    Call("shared, added into 16 bits, turned weight", 1111, 72, 40, total=BF16, transposed=True,
         sms=8),
    Call("shared, gradients of two tiles", 1200, 40, 200, sms=12),
]  # fmt: skip
FORWARDS = [
    *INSTANTIATIONS,
    *SHARED,
    *SHARED_GATED,
    *(Call(f"{name}, kept", 40, 72, 48, name, keep_pre=True) for name in ACTIVATIONS),
    Call("one row", 1, 64, 64, "gelu"),
    Call("eight of everything", 8, 8, 8, "silu", keep_pre=True),
    Call("one step of K, many tiles", 520, 8, 136, "gelu", keep_pre=True),
    Call("whole tiles", 256, 128, 512),
    Call("an odd number of slabs, nothing kept", 520, 72, 384, "silu"),
    Call("many steps of K", 130, 1000, 136, "gelu_tanh", F16, keep_pre=True),
    Call("no bias", 70, 72, 264, bias=False),
    Call("no bias, an activation", 70, 72, 264, "relu", bias=False),
    Call("pre-activations of 1e4: tails", 40, 64, 48, "gelu_tanh", scale=1e4),
    Call("pre-activations of 1e4: tails of the normal", 40, 64, 48, "gelu", scale=1e4),
    Call("pre-activations of 1e4, squared in fp16: infinities", 40, 64, 48, "relu_squared", F16,
         scale=1e4),
]  # fmt: skip
BACK_THROUGH = [
    *SHARED_BACK_THROUGH,
    *(Call(f"back through {name}", 40, 72, 48, name) for name in ACTIVATIONS[1:]),
    *(
        Call(f"back through, {name}{turned}", 520, 264, 184, "silu", dtype, transposed)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    *(
        Call(f"back through gates, {name}{turned}", 520, 264, 184, "swiglu", dtype, transposed)
        for name, dtype in DTYPES.items()
        for turned, transposed in (("", False), (", turned weight", True))
    ),
    Call("back through, two columns of tiles, no sums", 390, 72, 328, "gelu", bias=False),
    Call("back through gates, two columns of tiles, no sums", 390, 72, 328, "geglu", bias=False),
    Call("back through, many steps of K", 130, 1000, 136, "gelu_tanh", F16),
]
"""N rows, C outputs of the layer that is gone back through, F inputs."""
BACKWARDS = [
    *SHARED_BACKWARDS,
    Call("gradients of wide tiles", 200, 248, 200, "silu"),
    Call("gradients of wide tiles, fp16", 200, 248, 200, "silu", F16),
    Call("gradients of small tiles", 70, 72, 48, "gelu", F16),
    Call("gradients, turned weight", 150, 136, 264, "gelu_tanh", transposed=True),
    Call("gradients without an activation", 390, 72, 328),
    Call("gradients without anything", 130, 72, 72, bias=False),
    Call("gradients of relu, from its output", 40, 72, 48, "relu"),
    Call("gradients of relu squared", 40, 72, 48, "relu_squared"),
    Call("gradients of one row", 1, 72, 48, "silu"),
    Call("gradients of gates", 70, 72, 264, "swiglu"),
    Call("gradients of gates, fp16, turned weight", 150, 72, 48, "geglu", F16, transposed=True),
    Call("rows that are no multiple of 8", 333, 8, 16, "gelu"),
    Call("added into fp32", 300, 200, 264, "gelu", total=F32),
    Call("added into fp32, fp16", 300, 200, 264, "gelu", F16, total=F32),
    Call("added into 16 bits", 70, 200, 72, "silu", total=BF16),
    Call("added into 16 bits, fp16, turned weight", 70, 72, 200, dtype=F16, total=F16,
         transposed=True),
]  # fmt: skip
