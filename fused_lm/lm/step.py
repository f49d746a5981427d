"""One step: mixed precision, optimizer, update, and the evaluation that measures what it did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fused_lm.lm.data import Windows
from fused_lm.lm.gpt import GPT


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where it is fast: on GPUs that have it. A CPU trains in fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: shrinking a norm's gain or a bias has no reason."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def training_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    grad_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update. Returns the loss in nats and the gradient norm before clipping, detached."""
    with autocast(tokens.device):
        loss = model.loss(tokens, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach(), norm.detach()


def to_device(
    batch: tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets on ``device``; copies to a GPU run beside its work."""
    if device.type != "cuda":
        return batch
    tokens, targets = (t.pin_memory().to(device, non_blocking=True) for t in batch)
    return tokens, targets


@torch.no_grad()
def evaluate(
    model: GPT,
    windows: Windows,
    num_bytes: int,
    batch: int,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Loss over evenly spaced windows, the same ones every time.

    Args:
        model: Left in eval mode.
        windows: Of the validation text.
        num_bytes: Targets to score, about; all of them at most.
        batch: Windows at a time.
        should_stop: Asked after every batch.
    Returns:
        Mean loss in nats and the number of targets, or None if a stop was asked for.
    """
    starts = windows.evenly_spaced(max(1, num_bytes // windows.context))
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for first in range(0, len(starts), batch):
        rows = starts[first : first + batch]
        with autocast(device):
            loss = model.loss(*to_device(windows.gather(rows), device))
        total = total.to(loss.device) + loss.double() * len(rows)
        if should_stop():
            return None
    return float(total) / len(starts), len(starts) * windows.context
