"""Independent oracles: the textbook formula by plain autograd, in fp64 and in the dtype under
test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_lm.tolerance import check_close


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
    """(out, lse, weights after dropout). ``visible`` bool [B, H, T, S]; ``keep`` is the dropout
    factor.
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
    """(y, stream)."""
    stream = x if keep is None else x * keep.to(x.dtype)
    if residual is not None:
        stream = residual + stream
    centred = stream if rms else stream - stream.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), stream


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(outputs * cotangents)``; zeros where an input has no influence."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [c.to(o.dtype) for o, c in pairs],
        allow_unused=True,
    )
    return tuple(
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
    )


def check_against_oracle(
    ours: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Holds outputs and every gradient of ``ours`` against ``formula`` in fp64 and in the inputs'
    dtype.

    Args:
        ours, formula: Take the inputs, return equally many outputs; compared in order.
        inputs: Leaves; each gets a gradient.
        names: Of the outputs, then of the inputs, for messages.
    """
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    same = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, near, true = ours(*leaves), formula(*same), formula(*exact)
    cotangents = [torch.randn_like(t.detach().float()) for t in got]
    for cotangent, output in zip(cotangents, true, strict=True):
        cotangent.masked_fill_(~torch.isfinite(output.detach()), 0.0)
    rounded = [c.to(t.dtype) for c, t in zip(cotangents, got, strict=True)]
    results = [
        (*(t.detach() for t in outputs), *gradients(outputs, points, rounded))
        for outputs, points in ((got, leaves), (near, same), (true, exact))
    ]
    for name, mine, reference, truth in zip(names, *results, strict=True):
        check_close(mine, reference.to(mine.dtype), truth, name)
