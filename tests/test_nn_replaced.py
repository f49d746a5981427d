"""Blocks whose parts a user has replaced, patched or listens to: fused operators step aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm.nn import FeedForward, GPTBlock

B, T, C, H, FFN = 2, 7, 16, 4, 24


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_feed_forward_network_can_be_replaced(backend: str) -> None:
    block = GPTBlock(C, H)
    block.ffn = torch.nn.Sequential(torch.nn.Linear(C, FFN), torch.nn.Linear(FFN, C))
    with fused_lm.use_backend(backend):
        assert block(torch.randn(B, T, C)).shape == (B, T, C)


class Doubled(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("name", ["up", "down"])
def test_what_replaces_a_linear_is_called(name: str) -> None:
    """Another class, a patched forward, a hook of its own, a hook on all modules."""
    ffn = FeedForward(C, FFN)
    x = torch.randn(3, C)
    linear = getattr(ffn, name)
    other = Doubled(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    setattr(ffn, name, other)
    doubled = ffn(x)
    setattr(ffn, name, linear)
    assert not torch.allclose(ffn(x), doubled)
    stock = linear.forward
    linear.forward = lambda t: 2 * stock(t)
    torch.testing.assert_close(ffn(x), doubled)
    del linear.forward
    handle = linear.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(ffn(x), doubled)
    handle.remove()

    def double(module: torch.nn.Module, args: object, out: Tensor) -> Tensor | None:
        return 2 * out if module is linear else None

    handle = torch.nn.modules.module.register_module_forward_hook(double)
    torch.testing.assert_close(ffn(x), doubled)
    handle.remove()


def test_a_norm_without_eps_is_run_again_with_the_same_one() -> None:
    """RMSNorm(eps=None) takes that of its input's dtype, which under autocast is the stream's."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        block = GPTBlock(C, H, norm="rms_norm", recompute=recompute)
        block.norm2 = fused_lm.nn.RMSNorm(C)
        x = 0.02 * torch.randn(B, T, C)
        with fused_lm.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        grads.append(torch.autograd.grad(out.float().sum(), block.ffn.up.weight)[0])
    assert torch.equal(*grads)


def test_fp64_stays_fp64_under_autocast() -> None:
    block = GPTBlock(C, H, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(B, T, C, dtype=torch.float64)).dtype == torch.float64
