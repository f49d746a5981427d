"""Softmax attention on Triton, the host side: strides, tiles and launches of the kernels beside it.

Same functions and arguments as ``fused_lm.reference.attention``. Arguments are trusted: ``ops``
has checked shapes, dtypes and devices. Inputs are read through their strides, results take their
inputs' memory order (``fused_lm.reference.layout``); copied are only ``dout`` when its last dim is
not contiguous, and ``q`` in the forward when ``scale`` is not positive.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lm.reference.layout import empty_heads
from fused_lm.reference.philox import dropout_scale, dropout_threshold
from fused_lm.triton_kernels.attention_bwd import (
    attention_bwd_delta,
    attention_bwd_dkdv,
    attention_bwd_dq,
)
from fused_lm.triton_kernels.attention_common import Dropout, Masks, Strides
from fused_lm.triton_kernels.attention_dbias import attention_bwd_dbias
from fused_lm.triton_kernels.attention_fwd import attention_fwd
from fused_lm.triton_kernels.attention_tuning import Tuning, tune
from fused_lm.triton_kernels.attention_weights import attention_weights
from fused_lm.triton_kernels.interpreter import interpreting, patch_interpreter
from fused_lm.triton_kernels.launch import shared_memory_limit

patch_interpreter()


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> out [B, H, T, Dv], lse [B, H, T]."""
    call = _Call(q, k, v.shape[-1], mask, key_mask, bias, rng, softcap, dropout_p)
    out = empty_heads(q, call.DV)
    lse = q.new_empty(call.B, call.H, call.T, dtype=torch.float32)
    if call.S == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if lse.numel() == 0:
        return out, lse
    if scale <= 0:
        # The kernel takes the maximum before scaling, so the sign (or the zero) moves into q.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    with call.device():
        tile = call.tile("forward")
        n_tiles = triton.cdiv(call.T, tile.BLOCK_T)
        attention_fwd[(n_tiles * call.H * call.B,)](
            q, _strides(q), k, _strides(k), v, _strides(v), call.masks, call.dropout,
            out, _strides(out), lse,
            call.H, call.group, call.T, call.S, n_tiles, *call.band(lower, upper), scale, softcap,
            **call.head_dims(), **call.score_options(), **tile.launch_options(),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dbias) with dtype and order of their tensors; dbias may be (0,)."""
    call = _Call(q, k, v.shape[-1], mask, key_mask, bias, rng, softcap, dropout_p)
    dq, dk, dv = (empty_heads(t, t.shape[3]) for t in (q, k, v))
    dbias = bias.new_empty(bias.shape) if needs_dbias and bias is not None else q.new_empty(0)
    if call.B * call.H * call.T * call.S == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    inputs = (
        q, _strides(q), k, _strides(k), v, _strides(v), dout, _strides(dout),
        lse, delta, call.masks, call.dropout,
    )  # fmt: skip
    band = call.band(lower, upper)
    with call.device():
        _launch_delta(call, out, dout, dlse, delta)
        _launch_dkdv(call, inputs, dk, dv, band, scale, softcap)
        _launch_dq(call, inputs, dq, band, scale, softcap)
        if dbias.numel():
            _launch_dbias(call, inputs, dbias, band, scale, softcap)
    return dq, dk, dv, dbias


def attention_weights_forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    average_heads: bool,
) -> Tensor:
    """dropout(P) as [B, H, T, S], or its mean over heads [B, T, S], in the dtype of q."""
    call = _Call(q, k, q.shape[-1], mask, key_mask, bias, rng, softcap, dropout_p)
    planes = (call.B,) if average_heads else (call.B, call.H)
    weights = q.new_empty(*planes, call.T, call.S)
    if weights.numel() == 0 or call.H == 0:
        return weights.zero_()
    with call.device():
        tile = call.tile("weights")
        n_tiles = triton.cdiv(call.T, tile.BLOCK_T) * triton.cdiv(call.S, tile.BLOCK_S)
        dims = call.head_dims()
        attention_weights[(n_tiles * math.prod(planes),)](
            q, _strides(q), k, _strides(k), lse, call.masks, call.dropout, weights,
            call.H, call.group, call.T, call.S, *call.band(lower, upper), scale, softcap,
            D=dims["D"], D_PADDED=dims["D_PADDED"], AVERAGE=average_heads,
            **call.score_options(), **tile.launch_options(),
        )  # fmt: skip
    return weights


Band = tuple[int | None, int | None]


def _launch_delta(
    call: _Call, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor
) -> None:
    tile = call.tile("delta")
    n_tiles = triton.cdiv(call.T, tile.BLOCK_T)
    dlse_strides = None if dlse is None else Strides(*dlse.stride(), 0, tl.constexpr(False))
    options = tile.launch_options()
    del options["BLOCK_S"]
    attention_bwd_delta[(n_tiles * call.H * call.B,)](
        out, _strides(out), dout, _strides(dout), dlse, dlse_strides, delta,
        call.H, call.T, n_tiles,
        DV=call.DV, DV_PADDED=call.head_dims()["DV_PADDED"], **options,
    )  # fmt: skip


def _launch_dkdv(
    call: _Call, inputs: tuple[Any, ...], dk: Tensor, dv: Tensor,
    band: Band, scale: float, softcap: float,
) -> None:  # fmt: skip
    tile = call.tile("dkdv")
    n_tiles = triton.cdiv(call.S, tile.BLOCK_S)
    attention_bwd_dkdv[(n_tiles * (call.H // call.group) * call.B,)](
        *inputs, dk, _strides(dk), dv, _strides(dv),
        call.H, call.group, call.T, call.S, n_tiles, *band, scale, softcap,
        **call.head_dims(), **call.score_options(), **tile.launch_options(),
    )  # fmt: skip


def _launch_dq(
    call: _Call, inputs: tuple[Any, ...], dq: Tensor, band: Band, scale: float, softcap: float
) -> None:
    tile = call.tile("dq")
    n_tiles = triton.cdiv(call.T, tile.BLOCK_T)
    attention_bwd_dq[(n_tiles * call.H * call.B,)](
        *inputs, dq, _strides(dq), call.H, call.group, call.T, call.S, n_tiles, *band,
        scale, softcap,
        **call.head_dims(), **call.score_options(), **tile.launch_options(),
    )  # fmt: skip


def _launch_dbias(
    call: _Call, inputs: tuple[Any, ...], dbias: Tensor, band: Band, scale: float, softcap: float
) -> None:
    tile = call.tile("dbias")
    tiles = triton.cdiv(call.T, tile.BLOCK_T), triton.cdiv(call.S, tile.BLOCK_S)
    summed = [n == 1 for n in dbias.shape]
    owners = [1 if alone else n for alone, n in zip(summed, (call.B, call.H, *tiles), strict=True)]
    attention_bwd_dbias[(math.prod(owners),)](
        *inputs, dbias, _strides(dbias), call.B, call.H, call.group, call.T, call.S, *band,
        scale, softcap,
        **dict(zip(("SUM_B", "SUM_H", "SUM_T", "SUM_S"), summed, strict=True)),
        **call.head_dims(), **call.score_options(), **tile.launch_options(),
    )  # fmt: skip


class _Call:
    """What the kernels of one call have in common: sizes, optional tensors, options."""

    def __init__(
        self, q: Tensor, k: Tensor, DV: int, mask: Tensor | None, key_mask: Tensor | None,
        bias: Tensor | None, rng: Tensor | None, softcap: float, dropout_p: float,
    ) -> None:  # fmt: skip
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.DV = k.shape[2], DV
        self.group = self.H // max(k.shape[1], 1)
        self._q, self._softcap = q, softcap
        self.dropout = None
        if rng is not None:
            self.dropout = Dropout(rng, dropout_threshold(dropout_p), dropout_scale(dropout_p))
        # ``expand`` gives stride 0 to the dims of size 1.
        shape = self.B, self.H, self.T, self.S
        self.masks = Masks(
            mask, *([None] * 4 if mask is None else mask.expand(shape).stride()),
            key_mask, *([None] * 2 if key_mask is None else key_mask.stride()),
            bias, *([None] * 4 if bias is None else bias.expand(shape).stride()),
        )  # fmt: skip
        self._score_bytes = sum(t.element_size() for t in (mask, bias) if t is not None)

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be the tensors'."""
        return torch.cuda.device(self._q.device) if self._q.is_cuda else contextlib.nullcontext()

    def tile(self, kernel: str) -> Tuning:
        """Tiles for the current device, or for the interpreter."""
        limit = None
        if not interpreting():
            limit = shared_memory_limit(triton.runtime.driver.active.get_current_target().arch)
        return tune(kernel, self.D, self.DV, self._q.element_size(), limit, self._score_bytes)

    def band(self, lower: int | None, upper: int | None) -> Band:
        """The bounds: None where they hide nothing, else clamped so that they fit 32 bits."""
        if lower is not None:
            lower = None if lower <= 1 - self.T else min(lower, self.S)
        if upper is not None:
            upper = None if upper >= self.S - 1 else max(upper, -self.T)
        return lower, upper

    def head_dims(self) -> dict[str, int]:
        """tl.arange and tl.dot want powers of two, from 16 on."""
        D_PADDED, DV_PADDED = (max(16, triton.next_power_of_2(n)) for n in (self.D, self.DV))
        return {"D": self.D, "DV": self.DV, "D_PADDED": D_PADDED, "DV_PADDED": DV_PADDED}

    def score_options(self) -> dict[str, Any]:
        """Products of fp32 are exact unless torch allows TF32; those of 16 bits have no choice."""
        exact = (
            self._q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        )
        return {"SOFTCAP": self._softcap > 0, "PRECISION": "ieee" if exact else "tf32"}


def _strides(t: Tensor) -> Strides:
    unit = 16 // t.element_size()
    aligned = t.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in t.stride()[:3])
    return Strides(*t.stride(), tl.constexpr(aligned))
