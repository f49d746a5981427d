"""Attention, forward and backward, at 16k tokens in all as the field's tables have it:
``python -m benchmarks.attention --out DIR``. How it is measured: :mod:`benchmarks.harness`.

FLOPs are those of the pairs that causality lets through, whatever a key mask hides and a kernel
multiplies: 4 D a pair in the forward, 2.5 times that in the backward. Bytes are each tensor's,
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_lm

from . import command, contest, harness
from .attention_peers import PEERS
from .contest import Contestant, Given, Run, Work

BACKWARD_FLOPS = 2.5
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Case:
    """One attention, of S keys and as many queries, or ``queries``; ``group`` query heads share a
    key head.
    """

    D: int
    S: int
    features: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    group: int = 1
    queries: int = 0
    tokens: int = 16384
    model_dim: int = 2048

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shared = f" gqa{self.group}" if self.group > 1 else ""
        few = f" q{self.queries}" if self.queries else ""
        return f"{'+'.join(self.features) or 'full'} d{self.D} t{self.S}{few}{shared} {dtype}"

    @property
    def T(self) -> int:
        return self.queries or self.S

    @property
    def heads(self) -> int:
        return self.model_dim // self.D

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.S)

    @property
    def causal(self) -> bool:
        return "causal" in self.features

    @property
    def dropout_p(self) -> float:
        return DROPOUT_P if "dropout" in self.features else 0.0

    def given(self, device: torch.device) -> Given:
        B, H, T, S = self.batch, self.heads, self.T, self.S

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=self.dtype).requires_grad_()

        bias = randn(1, H, T, S) if "bias" in self.features else None
        key_mask = None
        if "key_mask" in self.features:
            lengths = torch.linspace(S // 2, S, B, device=device).long()
            key_mask = torch.arange(S, device=device) < lengths[:, None]
        q = randn(B, H, T, self.D)
        k, v = (randn(B, H // self.group, S, self.D) for _ in range(2))
        values = {"q": q, "k": k, "v": v, "bias": bias, "key_mask": key_mask}
        leaves = [t for t in (q, k, v, bias) if t is not None]
        dout = torch.randn_like(q)
        if self.dropout_p:
            return Given(values, leaves, dout, None)
        exact = one_head(self, values, dout)
        return Given(values, leaves, dout, partial(error_of, exact))

    def work(self) -> dict[str, Work]:
        pairs = self.S * (self.S + 1) / 2 if self.causal else self.T * self.S
        flops = 4.0 * self.batch * self.heads * pairs * self.D
        queries = self.T * self.heads * self.D
        keys = self.S * (self.heads // self.group) * self.D
        size = self.batch * self.dtype.itemsize
        bias = self.heads * self.T * self.S * self.dtype.itemsize if "bias" in self.features else 0
        return {
            "fwd": Work(flops, size * (2.0 * queries + 2 * keys) + bias),
            "bwd": Work(BACKWARD_FLOPS * flops, size * (4.0 * queries + 4 * keys) + 2 * bias),
        }


def grid(dry: bool) -> list[Case]:
    """In order of worth, each shape causal and full; on a CPU a few tiny ones."""
    if dry:
        tiny = Case(16, 16, ("causal",), group=2, tokens=32, model_dim=64)
        bias = replace(tiny, features=("bias",), group=1)
        weights = replace(bias, features=("weights",))
        return [tiny, bias, weights, replace(tiny, features=("key_mask", "dropout"), queries=1)]
    shapes = [
        *((D, S) for S in (4096, 1024, 16384, 512) for D in (128, 64)),
        *((D, S) for D in (256, 96, 32, 192) for S in (4096,)),
    ]
    cases = [Case(D, S, f) for D, S in shapes for f in (("causal",), ())]
    one, small = Case(128, 4096, ("causal",)), Case(64, 1024)
    cases += [replace(one, group=4), replace(one, dtype=torch.float16)]
    cases += [
        replace(small, features=features)
        for features in (
            ("bias",),
            ("key_mask",),
            ("causal", "dropout"),
            ("causal", "bias"),
            ("weights",),
        )
    ]
    return [*cases, replace(one, dtype=torch.float32), replace(one, features=(), queries=1)]


def one_head(case: Case, values: dict[str, Any], dout: Tensor) -> list[Tensor]:
    """fp64's output and gradients of q, k and v, of the first batch and key head."""
    group, bias, key_mask = case.group, values["bias"], values["key_mask"]
    parts = [values["q"][:1, :group], values["k"][:1, :1], values["v"][:1, :1]]
    leaves = [t.detach().double().requires_grad_() for t in parts]
    with fused_lm.use_backend("reference"):
        out = fused_lm.attention(
            *leaves,
            bias=None if bias is None else bias[:, :group].detach().double(),
            key_mask=None if key_mask is None else key_mask[:1],
            causal=case.causal,
        )
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout[:1, :group].double())]


def error_of(exact: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Of an output and gradients, the exact ones of one head, and a bias' gradient unseen."""
    parts = [mine[:1, : truth.shape[1]] for mine, truth in zip(got, exact, strict=False)]
    return contest.relative_error(parts, exact)


def ours(backend: str, case: Case, values: dict[str, Any]) -> Run:
    arguments = {**values, "causal": case.causal, "dropout_p": case.dropout_p}
    run = contest.ours("attention", backend, arguments)
    return _with_weights(backend, case, values) if "weights" in case.features else run


def _with_weights(backend: str, case: Case, values: dict[str, Any]) -> Run:
    """The output, and beside it the mean weights over heads, by a second pass from lse; raises
    ValueError if those are off.
    """
    q, k, v = (values[name] for name in ("q", "k", "v"))

    def both() -> tuple[Tensor, Tensor]:
        with fused_lm.use_backend(backend):
            out, lse = fused_lm.attention(q, k, v, causal=case.causal, return_lse=True)
            weights = fused_lm.attention_weights(q, k, lse, causal=case.causal, average_heads=True)
            return out, weights

    check_weights(case, values, both()[1])
    return lambda: both()[0]


def check_weights(case: Case, values: dict[str, Any], weights: Tensor) -> None:
    """Raises ValueError if mean weights over heads [B, T, S] are off in the first batch."""
    q, k = (values[name][:1].detach().double() for name in ("q", "k"))
    score = q @ k.repeat_interleave(case.group, 1).transpose(-2, -1) * case.D**-0.5
    if case.causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
    exact = score.softmax(-1).mean(1)
    error = contest.relative_error([weights[:1].detach()], [exact])
    if not error <= harness.MOST_ERROR:
        raise ValueError(f"error {error:.3g} of the weights, allowed {harness.MOST_ERROR:g}")


def sdpa(kind: SDPBackend, case: Case, values: dict[str, Any]) -> Run:
    """PyTorch's operator. It takes causal or a mask, not both: a call merges them."""
    if "weights" in case.features:
        raise ValueError("PyTorch's operator returns no weights")
    if kind is SDPBackend.MATH:
        contest.check_scores(case)
    causal, mask = case.causal, values["bias"]
    if values["key_mask"] is not None:
        mask = values["key_mask"][:, None, None, :]

    def run() -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(
                *(values["q"], values["k"], values["v"]),
                attn_mask=_merged(mask) if causal and mask is not None else mask,
                is_causal=causal and mask is None,
                dropout_p=case.dropout_p,
                enable_gqa=case.group > 1,
            )

    return run


def _merged(mask: Tensor) -> Tensor:
    hidden = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, float("-inf"))


@contextmanager
def in_order() -> Iterator[None]:
    """Gradients that repeat bitwise. torch would also fill memory that nobody has written to."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[assignment]


CONTESTANTS = [
    Contestant("cuda", partial(ours, "cuda")),
    Contestant("cuda in order", partial(ours, "cuda"), within=in_order),
    Contestant("triton", partial(ours, "triton"), compiles=True),
    *(
        Contestant(f"sdpa-{name}", partial(sdpa, kind))
        for name, kind in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    ),
    *PEERS,
]

if __name__ == "__main__":
    command.main("attention", grid, CONTESTANTS, "tflops")
