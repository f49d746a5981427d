"""Checks of an attention call, once, before any allocation.

The two spellings of causal and the window become one band: row t sees keys
``t + lower .. t + upper``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lm.ops.checks import (
    FLOATS,
    autocast_enabled,
    check_dropout,
    check_rng,
    check_same_device,
    shapes_of,
)

CAUSAL = (False, True, "top_left", "bottom_right")


class AttentionCall(NamedTuple):
    """Checked arguments of one call, in the order of ``torch.ops.fused_lm.attention_fwd``."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    rng: Tensor | None
    lower: int | None
    upper: int | None
    scale: float
    softcap: float
    dropout_p: float
    return_lse: bool


class AttentionWeightsCall(NamedTuple):
    """Checked arguments of one call, in the order of
    ``torch.ops.fused_lm.attention_weights_fwd``.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    mask: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    rng: Tensor | None
    lower: int | None
    upper: int | None
    scale: float
    softcap: float
    dropout_p: float
    average_heads: bool


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng: Tensor | None,
    return_lse: bool,
) -> AttentionCall:
    """The call with masks in four dims, the band, and the default scale; raises as the public op
    says.
    """
    shape = _common_shape(q, k, v)
    if shape is None:
        _check_query_and_key(q, k, {"q": q, "k": k, "v": v})
        if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                "v must be [B, Hkv, S, Dv] with batch, heads and length of k, got "
                + shapes_of(q=q, k=k, v=v)
            )
        shape = q.shape
        S = k.shape[2]
    else:
        S = shape[2]
    if mask is not None or key_mask is not None or bias is not None:
        mask, key_mask, bias = _checked_masks(q, k, mask, key_mask, bias)
    lower, upper = None, None
    if causal or window is not None:
        lower, upper = _band(shape[2], S, causal, window)
    if softcap or dropout_p or rng is not None:
        _check_numbers(softcap, dropout_p, rng, q)
        rng = rng if dropout_p else None
    scale = shape[3] ** -0.5 if scale is None else scale
    return AttentionCall(
        q, k, v, mask, key_mask, bias, rng, lower, upper, scale, softcap, dropout_p, return_lse
    )


def checked_weights_call(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng: Tensor | None,
    average_heads: bool,
) -> AttentionWeightsCall:
    """As :func:`checked_call`, for ``attention_weights``."""
    _check_query_and_key(q, k, {"q": q, "k": k})
    check_same_device({"q": q, "lse": lse})
    if lse.dtype not in FLOATS:
        raise TypeError(f"lse must be float, as attention returns it, got {lse.dtype}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be [B, H, T] of q, got {shapes_of(q=q, k=k, lse=lse)}")
    if dropout_p > 0.0 and rng is None:
        raise ValueError("attention_weights with dropout needs the rng that attention was given")
    mask, key_mask, bias = _checked_masks(q, k, mask, key_mask, bias)
    lower, upper = None, None
    if causal or window is not None:
        lower, upper = _band(q.shape[2], k.shape[2], causal, window)
    if softcap or dropout_p or rng is not None:
        _check_numbers(softcap, dropout_p, rng, q)
    rng = rng if dropout_p else None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return AttentionWeightsCall(
        q, k, lse, mask, key_mask, bias, rng, lower, upper, scale, softcap, dropout_p, average_heads
    )


def _common_shape(q: Tensor, k: Tensor, v: Tensor) -> torch.Size | None:
    """That of the commonest call, where all is alike: in few steps, because eager users pay for
    each one. None: look closer.

    Not while compiling: comparing T with S would be a guard.
    """
    if is_compiling():
        return None
    shape, dtype, device = q.shape, q.dtype, q.device
    alike = (
        len(shape) == 4
        and shape[3] > 0
        and k.shape == shape
        and v.shape == shape
        and dtype in FLOATS
        and k.dtype is dtype
        and v.dtype is dtype
        and k.device == device
        and v.device == device
    )
    return shape if alike else None


def _check_query_and_key(q: Tensor, k: Tensor, tensors: dict[str, Tensor]) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"attention takes [B, H, T, D] tensors, got {shapes_of(**tensors)}")
    check_same_device(tensors)
    dtype = q.dtype
    same = all(t.dtype == dtype for t in tensors.values())
    # Autocast narrows what is mixed, but leaves fp64 as it is.
    mixes = autocast_enabled(q.device) and not any(
        t.dtype == torch.float64 for t in tensors.values()
    )
    if dtype not in FLOATS or not (same or mixes):
        raise TypeError(
            "attention takes q, k and v of one dtype of float16, bfloat16, float32, float64, got "
            + ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        )
    B, H, _, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or D == 0:
        raise ValueError(
            "q [B, H, T, D] and k [B, Hkv, S, D] must share B and D >= 1, got "
            + shapes_of(**tensors)
        )
    Hkv = k.shape[1]
    if Hkv != H and (Hkv == 0 or H % Hkv != 0):
        raise ValueError(f"the heads of k must divide the heads of q, got {shapes_of(**tensors)}")


def _checked_masks(
    q: Tensor, k: Tensor, mask: Tensor | None, key_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be bool (True = attend), got {mask.dtype}; pass float masks as bias"
            )
        mask = _four_dims("mask", mask, q, k)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True = attend), got {key_mask.dtype}")
        check_same_device({"q": q, "key_mask": key_mask})
        if key_mask.shape != (q.shape[0], k.shape[2]):
            raise ValueError(
                f"key_mask must be [B, S], got {shapes_of(key_mask=key_mask, q=q, k=k)}"
            )
    if bias is not None:
        if bias.dtype not in FLOATS:
            raise TypeError(f"bias must be a float tensor, got {bias.dtype}; pass bool as mask")
        bias = _four_dims("bias", bias, q, k)
    return mask, key_mask, bias


def _four_dims(name: str, t: Tensor, q: Tensor, k: Tensor) -> Tensor:
    check_same_device({"q": q, name: t})
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    offset = 4 - t.dim()
    fits = offset >= 0 and all(
        size in (1, wanted) for size, wanted in zip(t.shape, full[offset:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to [B, H, T, S] = {list(full)}, got "
            + shapes_of(**{name: t})
        )
    return t[(None,) * offset] if offset else t


def _band(
    T: int, S: int, causal: bool | str, window: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """(lower, upper) of a call that is causal or has a window."""
    if not isinstance(causal, str):
        causal = bool(causal)
    if causal not in CAUSAL:
        raise ValueError(
            f"causal must be False, True, 'top_left' or 'bottom_right', got {causal!r}"
        )
    if causal is True and T != S:
        raise ValueError(
            f"causal=True is ambiguous for T = {T} queries and S = {S} keys: say causal='top_left' "
            "(row t sees keys up to t) or causal='bottom_right' (row t sees keys up to t + S - T)"
        )
    diagonal = 0 if causal == "top_left" or causal is True else S - T
    if window is None:
        return None, diagonal
    left, right = checked_window(window)
    if causal:
        right = 0
    return (
        None if left is None else diagonal - left,
        None if right is None else diagonal + right,
    )


def checked_window(window: Any) -> tuple[int | None, int | None]:
    """(left, right); ValueError if it is anything else."""
    try:
        left, right = window
        sizes = [side for side in (left, right) if side is not None]
        if any(isinstance(side, bool) or side < 0 or int(side) != side for side in sizes):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"window must be (left, right), each None or an int >= 0, got {window!r}"
        ) from None
    return left, right


def _check_numbers(softcap: float, dropout_p: float, rng: Tensor | None, q: Tensor) -> None:
    if softcap < 0.0 or math.isinf(softcap) or softcap != softcap:
        raise ValueError(f"softcap must be finite and >= 0 (0 = none), got {softcap}")
    check_dropout(dropout_p)
    if rng is not None:
        check_rng(rng, q)
