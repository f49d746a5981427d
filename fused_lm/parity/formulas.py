"""The textbook formulas by plain autograd: the truth in fp64, the yardstick in the dtype under
test.

Independent of :mod:`fused_lm.reference` on purpose: that is one of the things they judge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights after dropout).

    Args:
        q, k, v: As in :func:`fused_lm.attention`.
        visible: bool [B, H, T, S], every mask in one.
        keep: The factor dropout multiplies by, [B, H, T, S].
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    x = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    if bias is not None:
        x = x + bias.to(x.dtype)
    alive = torch.ones_like(x[..., :1], dtype=torch.bool)
    if visible is not None:
        alive = visible.any(-1, keepdim=True)
        # Rows without a key keep finite scores here, so that no NaN enters autograd, and are cut
        # below.
        x = x.masked_fill(~visible & alive, float("-inf"))
    weights = torch.softmax(x, dim=-1) * alive
    lse = torch.logsumexp(x.float() if x.dtype != torch.float64 else x, dim=-1)
    lse = lse.masked_fill(~alive.squeeze(-1), float("-inf"))
    if keep is not None:
        weights = weights * keep.to(weights.dtype)
    return weights @ v, lse, weights


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, stream); ``rms`` leaves out the mean."""
    stream = x if keep is None else x * keep.to(x.dtype)
    if residual is not None:
        stream = residual + stream
    centred = stream if rms else stream - stream.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), stream


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, transposed: bool = False
) -> Tensor:
    """[..., F]; ``weight`` is [F, C] (gated: [2F, C], gates first) or its transpose."""
    pre = F.linear(x, weight.T if transposed else weight, bias)
    if activation not in _GATES:
        return _ACTIVATIONS[activation](pre)
    half = pre.shape[-1] // 2
    return _ACTIVATIONS[_GATES[activation]](pre[..., :half]) * pre[..., half:]


def ffn(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool = False,
) -> Tensor:
    """[..., C2]."""
    hidden = linear_act(x, up_weight, up_bias, activation, transposed)
    return linear_act(hidden, down_weight, down_bias, "none", transposed)
