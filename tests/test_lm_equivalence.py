"""The same seed trains the same model: PyTorch's operators, the reference and Triton's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_lm
from fused_lm.lm import GPT, GPTConfig
from fused_lm.lm.step import make_optimizer

STEPS = 10
ROUNDING = 1e-5
"""Nats: 20 roundings of a loss of 4 in fp32; what was measured over 40 steps was 5e-7."""
SMALL: dict[str, Any] = {"vocab_size": 64, "context": 16, "num_layers": 1, "embed_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2": {"num_heads": 2},
    "Llama": {
        "num_heads": 2, "num_kv_heads": 1, "norm": "rms_norm", "activation": "swiglu",
        "positions": "rotary", "bias": False, "tie_head": False,
    },
}  # fmt: skip


def losses(backend: str, config: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Of every step, fp64 [STEPS]; tokens repeat with a period that the model can learn."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL, **config)).to(device)
    optimizer = make_optimizer(model, lr=6e-3, weight_decay=0.1)
    tokens = (torch.arange(2 * 17) * 7 % 64).view(2, 17).to(device)
    found = []
    with fused_lm.use_backend(backend):
        for _ in range(STEPS):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach().double().cpu())
    return torch.stack(found)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name == "GPT-2" else [pytest.mark.slow])
        for name, config in CONFIGS.items()
    ],
)
def test_curves_agree(config: dict[str, Any], device: torch.device) -> None:
    stock = losses("pytorch", config, device)
    assert stock[-1] < 0.7 * stock[0]  # it has learned something, so that there is what to compare
    for backend in ("reference", "triton"):
        ours = losses(backend, config, device)
        assert not torch.isnan(ours).any()
        torch.testing.assert_close(ours, stock, rtol=0.0, atol=ROUNDING)


@pytest.mark.slow
def test_curves_agree_under_dropout(device: torch.device) -> None:
    """Reference and kernels draw one mask from one seed, in forward and backward."""
    config = {"num_heads": 2, "dropout": 0.2}
    curves = [losses(backend, config, device) for backend in ("reference", "triton")]
    torch.testing.assert_close(*curves, rtol=0.0, atol=ROUNDING)
    assert (curves[0] - losses("reference", {"num_heads": 2}, device)).abs().max() > 0.01
