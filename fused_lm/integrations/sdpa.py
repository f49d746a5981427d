"""Our kernels behind torch's own ``scaled_dot_product_attention``, wherever it is called.

torch has a registry for implementations of its flash attention (``torch.nn.attention``, from 2.10
on). Ours is entered there under the name ``fused_lm`` by :func:`activate_sdpa`, never at import,
and takes the place of two operators on CUDA tensors: ``aten::_scaled_dot_product_flash_attention``
and its backward.

- What comes here is what torch gives to flash attention: float16 and bfloat16, no ``attn_mask``,
  head dims up to 256, all three equal. Masks, biases, float32 and float64 go elsewhere, as before.
  So does what cuDNN can run on Hopper and data centre Blackwell, where torch 2.13 asks it first,
  unless ``torch.backends.cuda.enable_cudnn_sdp(False)`` is said.
- Each call is decided by :mod:`fused_lm.dispatch`, like any of ours. Where that takes no kernel,
  torch's flash attention runs with the arguments that it would have had.
- A compiled graph runs its forward without autograd: there a record of inference decides, as
  nothing says that a backward will follow.

``is_causal`` of these operators is bottom-right where T != S: that is what torch's kernel computes,
and ``torch.nn.attention.bias.causal_lower_right`` calls them for it. ``is_causal`` of
``scaled_dot_product_attention`` is top-left, and such calls don't come here unless T == S.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import attention as torch_attention
from torch.nn import functional as F

from fused_lm import dispatch
from fused_lm.ops import registration
from fused_lm.ops.attention_checks import AttentionCall, checked_call

NAME = "fused_lm"
"""In torch's registry of flash attentions."""

_FORWARD = "_scaled_dot_product_flash_attention"
_BACKWARD = "_scaled_dot_product_flash_attention_backward"

MARKS = {"cuda": 2, "triton": 4, "reference": 6}
"""Backend -> where the forward's output ``unused``, one number, lies in its storage, by which the
backward knows who made it.

torch's own lies at 0. A place, because reading a value would wait for the GPU, and because compiled
graphs check dtypes, shapes, strides and that outputs lie at multiples of 16 bytes.
"""
MARK_ROOM = 2 * len(MARKS) + 2

_backwards: dict[str, Library] = {}
"""Dispatch key -> our backward, as long as anything may need it."""
_awaited: set[str] = set()
"""Dispatch keys of forwards that torch's own backward can't follow."""
_installed: _Overrides | None = None


def activate_sdpa() -> None:
    """Lets ``torch.nn.functional.scaled_dot_product_attention`` use our kernels on CUDA tensors,
    also inside ``nn.MultiheadAttention`` and other libraries; see this module for which calls.

    An implementation that was active in torch's registry, like FA4, is switched off; again is
    harmless. :func:`deactivate_sdpa` is the way back, :func:`sdpa_activated` both in one.

    Example::

        fused_lm.activate_sdpa()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    """
    if _current() == NAME:
        return
    torch_attention.register_flash_attention_impl(NAME, register_fn=_install)
    torch_attention.activate_flash_attention_impl(NAME)
    if _current() != NAME:  # torch 2.10 takes it for active: it can't be told that it no longer is
        _install()


def deactivate_sdpa() -> None:
    """Gives ``scaled_dot_product_attention`` back to torch's own flash attention.

    Does nothing where :func:`activate_sdpa` wasn't called, or another implementation was activated
    since. What was active before isn't brought back: :func:`sdpa_activated` does that.

    A backward of what ran while active may run later: torch's own takes over, or ours stays in
    place, for good, where torch's couldn't (dropout masks, causal rows without a key).
    """
    if _current() == NAME and hasattr(torch_attention, "restore_flash_attention_impl"):
        torch_attention.restore_flash_attention_impl()
    elif _installed is not None:
        _installed.remove()


@contextlib.contextmanager
def sdpa_activated() -> Iterator[None]:
    """:func:`activate_sdpa` for a block: at its end what was active before it is again, be it
    another implementation, ours, or none. Checkpointed forwards run again in their backward, which
    then belongs into the block.

    Example::

        with fused_lm.sdpa_activated():
            model(tokens).backward()
    """
    previous = _current()
    activate_sdpa()
    try:
        yield
    finally:
        _make_current(previous)


def _current() -> str | None:
    """The active implementation; None also where torch 2.10 still names ours, which was removed."""
    name = torch_attention.current_flash_attention_impl()
    removed = _installed is None or _installed.forward is None
    return None if name == NAME and removed else name


def _make_current(name: str | None) -> None:
    if _current() == name:
        return
    deactivate_sdpa()
    if name == NAME:
        activate_sdpa()
    elif name is not None:
        torch_attention.activate_flash_attention_impl(name)
    elif _current() is not None and hasattr(torch_attention, "restore_flash_attention_impl"):
        torch_attention.restore_flash_attention_impl()


def _install() -> _Overrides:
    """What torch's registry calls; it calls ``remove`` when another implementation is activated."""
    global _installed
    if _installed is not None:
        _installed.remove()
    _installed = _Overrides("CUDA")
    return _installed


class _Overrides:
    """The two operators for one dispatch key, in place until :meth:`remove`."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.forward: Library | None = _override(_FORWARD, self._run_forward, key)
        if key not in _backwards:
            _backwards[key] = _override(_BACKWARD, _run_backward, key)

    def remove(self) -> None:
        """Again is harmless. The backward stays where a forward may wait for it."""
        if self.forward is None:
            return
        self.forward._destroy()
        self.forward = None
        if self.key not in _awaited:
            _backwards.pop(self.key)._destroy()

    def _run_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        tensors = (query, key, value)
        if return_debug_mask or not _is_ours_to_judge(*tensors):
            return _torch_forward(*tensors, dropout_p, is_causal, return_debug_mask, scale)
        call = _call(*tensors, is_causal, scale, dropout_p, None)
        backend = dispatch.choose("attention", call)
        if backend == "pytorch":
            return _torch_forward(*tensors, dropout_p, is_causal, return_debug_mask, scale)
        T, S = query.shape[2], key.shape[2]
        if dropout_p > 0.0 or (is_causal and T > S):
            _awaited.add(self.key)
        state = query.new_empty(2, dtype=torch.uint64)
        if dropout_p > 0.0:
            rng = registration.make_rng(query.device)
            call, state = call._replace(rng=rng), rng[:2].view(torch.uint64)
        out, lse = registration.execute("attention_fwd", *call[:-1], backend)
        mark = query.new_empty(MARK_ROOM, dtype=torch.uint64)[MARKS[backend]]
        return _laid_as(out, query), lse, None, None, T, S, state, mark, query.new_empty(0)


def _run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    place = philox_offset.storage_offset()
    backend = next((name for name, mark in MARKS.items() if mark == place), None)
    if backend is None:
        rows = [t.transpose(1, 2) for t in (grad_out, query, key, value, out)]
        lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
        options = (dropout_p, is_causal, philox_seed, philox_offset)
        gradients = torch.ops.aten._flash_attention_backward(
            *rows, logsumexp, *lengths, *options, scale=scale
        )
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return dq, dk, dv
    # The state holds what differs from call to call; the slices of a mask start at 0 here.
    rng = F.pad(philox_seed.view(torch.int64), (0, 2)) if dropout_p > 0.0 else None
    call = _call(query, key, value, is_causal, scale, dropout_p, rng)
    dq, dk, dv, _ = registration.execute(
        "attention_bwd",
        *(_with_dense_rows(grad_out), None, *call[:3], out, logsumexp, *call[3:-1], False, backend),
    )
    return _laid_as(dq, query), _laid_as(dk, key), _laid_as(dv, value)


def _override(op: str, function: Callable[..., Any], key: str) -> Library:
    library = Library("aten", "IMPL", key)
    with warnings.catch_warnings():
        # The user asked for just that.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl(op, function, key)
    return library


def _is_ours_to_judge(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call is one that torch's gates let through: whoever calls the operator itself gets
    torch's own words about any other.
    """
    dtype, shape = query.dtype, query.shape
    return (
        dtype in (torch.float16, torch.bfloat16)
        and len(shape) == 4
        and all(t.dtype == dtype and t.dim() == 4 and t.shape[3] == shape[3] for t in (key, value))
    )


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    rng: Tensor | None,
) -> AttentionCall:
    q, k, v = (_with_dense_rows(t) for t in (query, key, value))
    causal, nothing = "bottom_right" if is_causal else False, (None, None, None)
    return checked_call(q, k, v, *nothing, causal, None, scale, 0.0, dropout_p, rng, False)


def _torch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> tuple[Any, ...]:
    """torch's own, by the operator below the one that we replace: it takes [B, T, H, D]."""
    rows = [t.transpose(1, 2) for t in (query, key, value)]
    T, S = query.shape[2], key.shape[2]
    out, lse, *state = torch.ops.aten._flash_attention_forward(
        *rows, None, None, T, S, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, T, S, *state


def _with_dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _laid_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory order of ``torch.empty_like(like)``, which a compiled graph insists on.

    Our operators know two orders, [B, H, T, D] and [B, T, H, D]; only others are copied, such as
    the [T, B, H, D] of ``nn.MultiheadAttention`` without ``batch_first``.
    """
    if t.stride() == like.stride():
        return t
    wanted = torch.empty_like(like, device="meta").stride()
    sizes = zip(t.shape, t.stride(), wanted, strict=True)
    if all(size == 1 or stride == other for size, stride, other in sizes):
        return t
    return torch.empty_like(like).copy_(t)
