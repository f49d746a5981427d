"""Rotary positions by Triton: checks nothing, allocates, launches once.

Arguments are those of ``fused_lm.reference.rotary``; fp64 is refused by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fused_lm.reference.layout import empty_heads
from fused_lm.triton_kernels.interpreter import patch_interpreter
from fused_lm.triton_kernels.rotary_kernel import rotary_kernel

TILE_PAIRS = 1024
"""Pairs of a tile: 8 per thread, which is one load of 16 bytes for each half of a 16-bit row; 64
warps of such programs keep 64 KB of loads in flight per SM, where about 26 KB are needed. Not
measured on a GPU yet.
"""
NUM_WARPS = 4


@dataclass(frozen=True)
class Tuning:
    """Tile [block_t, block_h, R/2] of the heads of x, and heads per tile of those of k."""

    block_t: int
    block_h: int
    block_hkv: int


def tune(half: int, H: int, Hkv: int) -> Tuning:
    """All heads of as many rows as fill a tile, or some of the heads of one row."""
    row_pairs = triton.next_power_of_2(half)
    block_h = min(triton.next_power_of_2(max(H, 1)), max(1, TILE_PAIRS // row_pairs))
    block_t = max(1, TILE_PAIRS // (row_pairs * block_h))
    most = max(1, TILE_PAIRS // (row_pairs * block_t))
    return Tuning(block_t, block_h, min(triton.next_power_of_2(max(Hkv, 1)), most))


def rotary_forward(
    x: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] and k [B, Hkv, T, D] turned, each in its own memory order; (0,) without k."""
    B, H, T, D = x.shape
    S, half = cos.shape
    y = empty_heads(x, D)
    k_turned = x.new_empty(0) if k is None else empty_heads(k, D)
    if B * T == 0:
        return y, k_turned
    Hkv = 0 if k is None else k.shape[1]
    tuning = tune(half, H, Hkv)
    n_tiles = triton.cdiv(T, tuning.block_t)
    of_k = (None, None, None, None) if k is None else (k, k.stride(), k_turned, k_turned.stride())
    places = None
    if positions is not None:
        places = (0, positions.stride(0)) if positions.dim() == 1 else positions.stride()
    patch_interpreter()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        rotary_kernel[(B * n_tiles,)](
            x, x.stride(), y, y.stride(), H, *of_k, Hkv, cos.contiguous(), sin.contiguous(),
            positions, places, T, S, n_tiles,
            D=D, HALF=half, HALF_PADDED=triton.next_power_of_2(half),
            REST_PADDED=triton.next_power_of_2(max(D - 2 * half, 1)),
            INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_T=tuning.block_t,
            BLOCK_H=tuning.block_h, BLOCK_HKV=tuning.block_hkv, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y, k_turned


def instantiations() -> dict[str, Callable[[], object]]:
    """Name -> one call with meta tensors, for ``compile_check``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "rotary-bf16-d128-gqa": lambda: _instantiate(bf16, 32, 8, 128, 128),
        "rotary-fp32-d64": lambda: _instantiate(fp32, 12, 12, 64, 64, inverse=True),
        "rotary-fp16-d80-partial": lambda: _instantiate(fp16, 32, 0, 80, 32),
        "rotary-bf16-d256-interleaved-positions": lambda: _instantiate(
            bf16, 16, 16, 256, 64, interleaved=True, packed=True
        ),
    }


def _instantiate(
    dtype: torch.dtype, H: int, Hkv: int, D: int, R: int, *,
    interleaved: bool = False, inverse: bool = False, packed: bool = False,
) -> None:  # fmt: skip
    B, T = 2, 1024
    qkv = torch.empty(B, T, H + 2 * Hkv, D, dtype=dtype, device="meta").transpose(1, 2)
    k = qkv[:, H : H + Hkv] if Hkv else None
    table = torch.empty(T, R // 2, device="meta")
    positions = torch.empty(B, T, dtype=torch.int64, device="meta") if packed else None
    rotary_forward(qkv[:, :H], k, table, table, positions, interleaved, inverse)
