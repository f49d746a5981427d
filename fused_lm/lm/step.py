"""One step: optimizer, loss, gradients in one or several parts, clipping, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_lm.lm.parallel import SOLO, Team
from fused_lm.lm.precision import Precision
from fused_lm.lm.sharded import whole


class LossModule(nn.Module):
    """A model whose forward is its loss, so that every use of it passes the hooks of a wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        measure: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """The mean loss, or ``measure(logits, targets)``. Tokens and targets are [B, T]."""
        if measure is not None:
            return measure(self.model(tokens), targets)
        return self.model.loss(tokens, targets)  # type: ignore[operator]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: shrinking a norm's gain or a bias has no reason."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def training_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
    grad_clip: float,
    precision: Precision,
    *,
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    team: Team = SOLO,
) -> tuple[Tensor, Tensor]:
    """One update.

    Args:
        module: A :class:`LossModule`, wrapped by ``team`` or not.
        tokens, targets: [B, T], this process' share of the batch.
        grad_clip: Largest norm of the gradient, over all parameters and processes.
        accumulate: Equal parts in which the share is read, one after the other; divides B.
        scaler: For fp16. A step whose gradients overflow changes no weight; its norm is inf or NaN.
    Returns:
        The mean loss of the share in nats and the gradient norm before clipping, detached.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.device)
    parts = zip(tokens.chunk(accumulate), targets.chunk(accumulate), strict=True)
    for index, part in enumerate(parts, 1):
        with team.gradients(module, last=index == accumulate):
            with precision.autocast():
                loss = module(*part) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        total += loss.detach()
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return total, whole(norm).detach()


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets on ``device``; copies to a GPU run beside its work."""
    if device.type != "cuda":
        return batch
    tokens, targets = (t.pin_memory().to(device, non_blocking=True) for t in batch)
    return tokens, targets
