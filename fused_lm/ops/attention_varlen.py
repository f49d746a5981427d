"""``attention_varlen``: the public function and the way of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.attention import as_operands, attention
from fused_lm.ops.attention_varlen_checks import (
    AttentionVarlenCall,
    checked_call,
    one_kernel_refuses,
)
from fused_lm.ops.reference_gradient import register_reference_gradient
from fused_lm.reference import attention_varlen as reference
from fused_lm.reference.attention_varlen import as_heads, checked_bounds


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each of several sequences that lie packed one after the other.

    Args:
        q: [N, H, D] bf16 | fp16 | fp32 | fp64, the queries of all sequences, any strides (a last
            dim that isn't contiguous is copied).
        k: [M, Hkv, D], dtype of q; Hkv divides H (grouped-query attention).
        v: [M, Hkv, Dv], dtype of q.
        cu_seqlens_q: int [sequences + 1], where each begins and, last, where all end: rises from 0
            to N. A sequence may be empty.
        cu_seqlens_k: The same for k and v, up to M.
        causal, window: As in :func:`fused_lm.attention`, per sequence.
        scale: Multiplies q.k before the softmax. Default ``D ** -0.5``.
        softcap: c > 0 turns each scaled score x into ``c * tanh(x / c)``.
        return_lse: Also return the log-sum-exp of the scores; it can be differentiated.
    Returns:
        [N, H, Dv], dtype of q. With ``return_lse``: also lse [H, N] fp32 (fp64 for fp64), natural
        log. Rows without a visible key are 0 with lse = -inf and zero gradients, never NaN.

    On Hopper the CUDA backend is one kernel, which reads the bounds (int32 or int64, on the device
    of q) where they are: no wait for the GPU, and no check of what they hold. Bounds that don't
    rise from 0 to the last row, and ``causal=True`` for a sequence with T != S, then give undefined
    results, without an access outside of the tensors. So is its backward, whose blocks add to dq in
    any order; under ``torch.use_deterministic_algorithms(True)`` it is one per sequence, and reads
    the bounds on the host. Everywhere else, forward too: bounds are read and checked, and each
    sequence is a call of :func:`fused_lm.attention`, which chooses its backend itself.

    Accuracy: |err| <= 2 x the error of the same-dtype torch reference (fused_lm/tolerance.py).
    Memory: 4*H*N bytes beyond the output in the kernel; its backward takes 4*D*H bytes more per row
        of q, and for each sequence up to 128 rows, D being the compiled head dim.
    Backends: cuda (Ampere and later, in one kernel on Hopper; 16 bits, head dims that are multiples
        of 8 up to 256), triton (Ampere and later), pytorch, reference.
    Raises: ValueError on shape or value, TypeError on dtype or device mix, RuntimeError if a forced
        backend refuses.
    Source: Dao 2023 (arXiv:2307.08691) alg. 1; Shah et al. 2024 (arXiv:2407.08608).
    """
    call = checked_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap, return_lse
    )
    backend = dispatch.choose("attention_varlen", call)
    if _is_one_operator(backend, call):
        out, lse = _run((*as_operands(call[:3]), *call[3:-1]), backend)
        return (out, lse) if return_lse else out
    return _by_sequence(call, causal, window)


def _is_one_operator(backend: str, call: AttentionVarlenCall) -> bool:
    """Whether no sequence is a call of its own: where one kernel takes all, and where nobody can
    read bounds while compiling.
    """
    if backend == "pytorch":
        return False
    if backend in ("triton", "reference"):
        return is_compiling()
    return one_kernel_refuses(call) is None


def _by_sequence(
    call: AttentionVarlenCall, causal: bool | str, window: tuple[int | None, int | None] | None
) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v = call[:3]
    bounds_q = checked_bounds("cu_seqlens_q", call.cu_seqlens_q, q.shape[0])
    bounds_k = checked_bounds("cu_seqlens_k", call.cu_seqlens_k, k.shape[0])
    outputs, statistics = [], []
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        result = attention(
            *(as_heads(q[rows]), as_heads(k[keys]), as_heads(v[keys])),
            causal=causal,
            window=window,
            scale=call.scale,
            softcap=call.softcap,
            return_lse=call.return_lse,
        )
        out, *lse = result if isinstance(result, tuple) else (result,)
        outputs.append(out[0].transpose(0, 1))
        statistics += [statistic[0] for statistic in lse]
    if not outputs:
        outputs = [(q.sum() + k.sum() + v.sum()) * q.new_ones(0, q.shape[1], v.shape[2])]
        statistics = [q.new_empty(q.shape[1], 0, dtype=_accumulator(q))]
    packed = torch.cat(outputs)
    return (packed, torch.cat(statistics, dim=1)) if call.return_lse else packed


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    return output


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the 11 inputs: q, k and v have one."""
    nothing: tuple[None, ...] = (None,) * 8
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    if dout is None:
        dout = torch.zeros_like(out)
    arguments = (dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options)
    return (*registration.run_backward("attention_varlen_bwd", *arguments), *nothing)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    N, H, _ = q.shape
    return q.new_empty(N, H, v.shape[2]), q.new_empty(H, N, dtype=_accumulator(q))


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv


registration.implement("attention_varlen_fwd", "attention_varlen", "attention_varlen_forward")
registration.implement("attention_varlen_bwd", "attention_varlen", "attention_varlen_backward")
registration.register_fake("attention_varlen_fwd", _fake_forward)
registration.register_fake("attention_varlen_bwd", _fake_backward)
registration.register_fake_of_cuda("attention_varlen_fwd", _fake_forward)
registration.register_fake_of_cuda("attention_varlen_bwd", _fake_backward)
registration.register_autograd("attention_varlen_fwd", _backward, _setup_context)
_run = registration.route(
    "attention_varlen_fwd", 5, reference.attention_varlen_forward, _setup_context, _backward
)
register_reference_gradient("attention_varlen_bwd", reference.attention_varlen_backward)
