"""``fused_lm.attention`` against the formula in fp64, on every backend that runs here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_lm
from fused_lm.reference.attention import visible as band_of
from fused_lm.reference.philox import scaled_keep
from tests import oracle
from tests.gpu import CUDA

BACKENDS = ("reference", "pytorch", "triton", *CUDA)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call; ``why`` is what it is there for."""

    why: str
    B: int = 2
    H: int = 2
    Hkv: int = 2
    T: int = 37
    S: int = 37
    D: int = 16
    Dv: int = 16
    dtype: torch.dtype = F32
    mask: tuple[int, ...] | None = None
    key_mask: bool = False
    bias: tuple[int, ...] | None = None
    band: tuple[int | None, int | None] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)
    dropout_p: float = 0.0
    dead_rows: bool = False


CAUSAL: dict[str, Any] = {"band": (None, 0), "options": {"causal": True}}
CASES = [
    Case("plain, ragged against every tile"),
    Case("fp16", dtype=F16),
    Case("bf16", dtype=BF16),
    Case("one query, three keys", T=1, S=3, B=1),
    Case("more keys than one tile, T != S", T=20, S=150, B=1),
    Case("more queries than one tile", T=150, S=20, B=1),
    Case("head dim 40, value head dim of its own", D=40, Dv=24),
    Case("head dim 80", D=80, Dv=80, B=1),
    Case("head dim 1", D=1, Dv=3),
    Case("head dim 96, bf16, causal", D=96, Dv=96, dtype=BF16, B=1, **CAUSAL),
    Case("head dim 512", D=512, Dv=512, B=1, H=1, Hkv=1, T=9, S=18),
    Case("GQA", H=6, Hkv=2, B=1),
    Case("MQA, causal, bf16", H=3, Hkv=1, dtype=BF16, **CAUSAL),
    Case("causal", **CAUSAL),
    Case("causal over several tiles", B=1, H=1, Hkv=1, T=200, S=200, **CAUSAL),
    Case("causal top-left, T < S", T=20, S=40, band=(None, 0), options={"causal": "top_left"}),
    Case("causal bottom-right, T < S", T=20, S=40, band=(None, 20),
         options={"causal": "bottom_right"}),
    Case("bottom-right, T > S: rows without a key", T=40, S=15, band=(None, -25),
         options={"causal": "bottom_right"}),
    Case("sliding window", T=150, S=150, B=1, H=1, Hkv=1, band=(-20, 5),
         options={"window": (20, 5)}),
    Case("window, causal, T != S", T=30, S=90, B=1, band=(50, 60),
         options={"window": (10, None), "causal": "bottom_right"}),
    Case("scale and softcap", options={"scale": 0.7, "softcap": 3.0}),
    Case("softcap, bf16, causal", dtype=BF16, band=(None, 0),
         options={"softcap": 5.0, "causal": True}),
    Case("mask [T, S] with dead rows", mask=(37, 37), dead_rows=True),
    Case("mask [B, 1, T, S]", mask=(2, 1, 37, 37)),
    Case("mask [B, H, 1, S]", mask=(2, 2, 1, 37)),
    Case("key mask with a sequence all masked", key_mask=True, dead_rows=True),
    Case("key mask and causal", key_mask=True, **CAUSAL),
    Case("bias [B, H, T, S]", bias=(2, 2, 37, 37)),
    Case("bias [T, S], summed over batch and heads", bias=(37, 37)),
    Case("bias [B, 1, 1, S], fp16", bias=(2, 1, 1, 37), dtype=F16),
    Case("bias [1, H, T, S], causal, bf16", bias=(1, 2, 37, 37), dtype=BF16, **CAUSAL),
    Case("bias [H, 1, 1], softcap, GQA", bias=(4, 1, 1), H=4, options={"softcap": 2.0}),
    Case("bias [T, 1] and mask", bias=(37, 1), mask=(37, 37), dead_rows=True),
    Case("dropout", dropout_p=0.3),
    Case("dropout, causal, bf16, GQA", H=4, dropout_p=0.2, dtype=BF16, **CAUSAL),
    Case("everything", H=4, T=50, S=70, D=24, Dv=40, mask=(2, 1, 50, 70), key_mask=True,
         bias=(4, 50, 70), band=(-20, 20), dropout_p=0.25, dead_rows=True,
         options={"window": (40, 40), "causal": "bottom_right", "softcap": 4.0, "scale": 0.3}),
    Case("dropout of everything", dropout_p=1.0),
]  # fmt: skip


def _tensors(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(case.dtype)

    B, T, S = case.B, case.T, case.S
    mask = key_mask = None
    if case.mask is not None:
        mask = torch.rand(case.mask, device=device) > 0.3
        if case.dead_rows:
            mask[..., ::5, :] = False
    if case.key_mask:
        key_mask = torch.rand(B, S, device=device) > 0.3
        if case.dead_rows:
            key_mask[0] = False
    bias = None if case.bias is None else randn(*case.bias)
    return {
        "q": randn(B, case.H, T, case.D),
        "k": randn(B, case.Hkv, S, case.D),
        "v": randn(B, case.Hkv, S, case.Dv),
        "mask": mask,
        "key_mask": key_mask,
        "bias": bias,
    }


def _visible(case: Case, tensors: dict[str, Tensor | None], device: torch.device) -> Tensor:
    visible = torch.ones(case.B, case.H, case.T, case.S, dtype=torch.bool, device=device)
    if tensors["mask"] is not None:
        visible = visible & tensors["mask"]
    if tensors["key_mask"] is not None:
        visible = visible & tensors["key_mask"][:, None, None, :]
    band = band_of(case.T, case.S, *case.band, device)
    return visible if band is None else visible & band


def _rng(case: Case, device: torch.device) -> Tensor | None:
    if case.dropout_p == 0.0:
        return None
    return torch.tensor([2**61 + 12345, 77, 3, 5], device=device)


def _pytorchs(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Any = 0.0, scale: float | None = None
) -> Tensor:
    """PyTorch's operator itself, with every mask in one tensor: the yardstick of backend "pytorch"
    in fp32 on a GPU, where the operator multiplies in three products of TF32 (CUTLASS'
    OpMultiplyAddFastF32) and errs a little more than fp32 does.
    """
    mask = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, float("-inf")) + bias
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    if backend in CUDA:
        if case.D % 8 or case.Dv % 8 or case.D > 256:
            pytest.skip("no CUDA kernel has this head dim")
        if case.dtype == F32:  # they take 16 bits
            case = replace(case, dtype=BF16)
    tensors, rng = _tensors(case, device), _rng(case, device)
    visible = _visible(case, tensors, device)
    keep = None
    if rng is not None:
        shape = (case.B, case.H, case.T, case.S)
        keep = scaled_keep(rng, *shape, case.dropout_p, F64)
    only_out = backend == "pytorch"
    if only_out and (rng is not None or case.options.get("softcap")):
        pytest.skip("PyTorch's operator has no softcap and draws its own dropout")

    def ours(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            result = fused_lm.attention(
                q, k, v, mask=tensors["mask"], key_mask=tensors["key_mask"],
                bias=bias[0] if bias else None, dropout_p=case.dropout_p, rng=rng,
                return_lse=not only_out, **case.options,
            )  # fmt: skip
        return (result,) if only_out else result

    def formula(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        if only_out and q.is_cuda and q.dtype == F32:
            return (_pytorchs(q, k, v, visible, *bias, scale=case.options.get("scale")),)
        out, lse, _ = oracle.attention(
            q, k, v, visible=visible, bias=bias[0] if bias else None, keep=keep,
            scale=case.options.get("scale"), softcap=case.options.get("softcap", 0.0),
        )  # fmt: skip
        return (out,) if only_out else (out, lse)

    inputs = [tensors[name] for name in ("q", "k", "v", "bias") if tensors[name] is not None]
    names = [*(("out",) if only_out else ("out", "lse")), "dq", "dk", "dv", "dbias"]
    oracle.check_against_oracle(ours, formula, inputs, names[: len(names) - 4 + len(inputs)])
