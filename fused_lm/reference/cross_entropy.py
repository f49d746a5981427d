"""Cross entropy with label smoothing, z-loss and softcap, the derivation in plain PyTorch.

    s    = softcap * tanh(logits / softcap)                           without softcap: the logits
    lse  = log(sum_j exp(s_j));   p_j = exp(s_j - lse)
    loss = (1 - eps) * (lse - s_t) + eps * (lse - mean(s)) + z_loss * lse^2

Backward of a row whose loss counts with weight w ("mean": dloss / number of counted rows), from
d lse / d s_j = p_j:

    ds_j      = w * ((1 + 2 * z_loss * lse) * p_j - (1 - eps) * [j = t] - eps / V)
    dlogits_j = ds_j * (1 - (s_j / softcap)^2)

Rows whose target is ignore_index don't count: loss 0, gradient 0, whatever their logits hold. log p
comes from log_softmax, which subtracts the row's maximum first: s - lse would lose digits of large
logits. Everything is fp32 (fp64 for fp64).

Sources: Szegedy et al. 2016 (arXiv:1512.00567, label smoothing); Chowdhery et al. 2022
(arXiv:2204.02311, z-loss); Gemma Team 2024 (arXiv:2408.00118, softcap).
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N] -> loss ([N], or [] reduced), dlogits [N, V].

    dlogits is that of a loss of 1 (each), empty unless ``gradient`` is ``"with the loss"``.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss = reduced(row_losses(logits, target, *options), target, ignore_index, reduction)
    if gradient != "with the loss":
        return loss, logits.new_empty(0)
    one = loss.new_ones(()).expand(loss.shape)
    return loss, cross_entropy_backward(one, logits, target, *options, reduction)


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """dlogits [N, V] of dloss ([N], or [] reduced); differentiable in dloss and logits."""
    counted = (target != ignore_index).unsqueeze(-1)
    s = _scores(logits, counted, softcap)
    log_p = torch.log_softmax(s, -1)
    weight = row_weights(dloss.to(s.dtype), target, ignore_index, reduction).unsqueeze(-1)
    ds = log_p.exp()
    if z_loss:
        ds = ds * (1.0 + 2.0 * z_loss * torch.logsumexp(s, -1, keepdim=True))
    if label_smoothing:
        ds = ds - label_smoothing / s.shape[-1]
    is_target = torch.arange(s.shape[-1], device=s.device) == _index(target, counted)
    ds = torch.where(is_target, ds - (1.0 - label_smoothing), ds)
    if softcap:
        ds = ds * (1.0 - (s / softcap).square())
    return (ds * weight).masked_fill(~counted, 0.0).to(logits.dtype).contiguous()


def cross_entropy_backward_in_place(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> None:
    """:func:`cross_entropy_backward` into the memory of the logits."""
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    logits.copy_(cross_entropy_backward(dloss, logits, target, *options))


def cross_entropy_rows_in_place(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradient: bool,
) -> None:
    """Fills the loss [N]; with ``gradient`` overwrites the logits [N, V] with their gradient, each
    row times its weight of ``weights`` [N], None: 1.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss.copy_(row_losses(logits, target, *options))
    if gradient:
        dloss = torch.ones_like(loss) if weights is None else weights
        logits.copy_(cross_entropy_backward(dloss, logits, target, *options, "none"))


def scale_in_place(dlogits: Tensor, dloss: Tensor) -> None:
    """dlogits *= dloss, one factor ([]) or one a row ([N]), rounded once."""
    dlogits.copy_(scaled(dlogits, dloss))


def scaled(t: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t * factor, one factor ([]) or one a row ([N]), in ``dtype`` (default: of t).

    Widened by hand: torch rounds a 0-dim factor to the dtype of t first.
    """
    factor = factor.unsqueeze(-1) if factor.dim() else factor
    return (t.to(factor.dtype) * factor).to(dtype or t.dtype)


def row_losses(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """[N]: the loss of every row, 0 where it doesn't count."""
    counted = (target != ignore_index).unsqueeze(-1)
    s = _scores(logits, counted, softcap)
    log_p = torch.log_softmax(s, -1)
    loss = -log_p.gather(-1, _index(target, counted)).squeeze(-1)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(s, -1).square()
    return loss.masked_fill(~counted.squeeze(-1), 0.0)


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss per row, summed, or averaged over the rows that count (NaN if none does)."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (target != ignore_index).sum()


def row_weights(dloss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """[N]: what each row's own gradient is multiplied by."""
    if reduction == "mean":
        dloss = dloss * inverse_count(target, ignore_index).to(dloss.dtype)
    return dloss.expand(target.shape)


def inverse_count(target: Tensor, ignore_index: int) -> Tensor:
    """[] fp64: 1 / number of rows that count; 1 if none does, for gradients of 0, not NaN."""
    return 1.0 / (target != ignore_index).sum().clamp(min=1).double()


def _scores(logits: Tensor, counted: Tensor, softcap: float) -> Tensor:
    """s [N, V]; rows that don't count are zeros, so that no NaN of theirs enters autograd."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = wide.masked_fill(~counted, 0.0)
    return softcap * torch.tanh(wide / softcap) if softcap else wide


def _index(target: Tensor, counted: Tensor) -> Tensor:
    return target.long().unsqueeze(-1).masked_fill(~counted, 0)
