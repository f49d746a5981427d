"""Attention keeps its inputs' order in memory, so that a block's transposes stay views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm.nn import GPTBlock
from fused_lm.reference.layout import rows_first
from tests.gpu import TRITON_LATER

KERNELS = ("reference", "triton")
MOST = ("reference", *TRITON_LATER)
BACKENDS = (*KERNELS, "pytorch")


def packed_heads(device: torch.device, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[3, B, H, T, D] of a packed projection [B, T, 3, H, D]."""
    packed = torch.randn(2, 19, 3, 4, D, device=device).to(dtype)
    return packed.permute(2, 0, 3, 1, 4)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, **options: Any) -> Any:
    with fused_lm.use_backend(backend):
        return fused_lm.attention(q, k, v, causal="bottom_right", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "D, dtype", [(16, torch.float32), (40, torch.bfloat16), (5, torch.float16)], ids=str
)
def test_heads_of_a_packed_projection(
    D: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    views = [t.detach().requires_grad_() for t in packed_heads(device, D, dtype)]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    out, expected = attend(*views, backend), attend(*dense, backend)
    # PyTorch's operator promises no order: on a GPU it pads heads of 5 and returns a slice.
    if backend != "pytorch" or not out.is_cuda:
        assert out.transpose(1, 2).is_contiguous()
    dout = torch.randn_like(expected)
    got = torch.autograd.grad(out, views, dout)
    wanted = torch.autograd.grad(expected, dense, dout)
    if backend != "pytorch":
        assert all(gradient.transpose(1, 2).is_contiguous() for gradient in got)
        assert expected.is_contiguous() and all(gradient.is_contiguous() for gradient in wanted)
        torch.testing.assert_close((out, *got), (expected, *wanted), rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_each_result_follows_its_own_input(backend: str, device: torch.device) -> None:
    """q in one order, k in the other, v of another width, grouped heads, a one-row query."""
    k = torch.randn(2, 2, 9, 16, device=device, requires_grad=True)
    v = torch.randn(2, 9, 2, 24, device=device).transpose(1, 2).requires_grad_()
    for T in (1, 5):
        q = torch.randn(2, T, 4, 16, device=device).transpose(1, 2).requires_grad_()
        out = attend(q, k, v, backend)
        assert out.shape == (2, 4, T, 24) and out.transpose(1, 2).is_contiguous()
        dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert dq.transpose(1, 2).is_contiguous() and dv.transpose(1, 2).is_contiguous()
        assert dk.is_contiguous()
        assert attend(q.contiguous(), k, v, backend).is_contiguous()


@pytest.mark.parametrize("backend", MOST)
def test_results_may_be_changed_in_place(backend: str, device: torch.device) -> None:
    """What an operator returns is no view: autograd would forbid it."""
    q, k, v = (t.detach().requires_grad_() for t in packed_heads(device, 8))
    out = attend(q, k, v, backend)
    doubled = out.clone() * 2
    assert torch.equal(out.mul_(2), doubled)


@pytest.mark.parametrize("backend", MOST)
def test_opcheck_of_both_orders(backend: str, device: torch.device) -> None:
    """The fake kernels promise the strides that the real ones give."""
    op = torch.ops.fused_lm.attention_fwd.default
    views = packed_heads(device, 8)
    for q, k, v in (views, (views[0].contiguous(), views[1], views[2].contiguous())):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        rest = (None, None, None, None, None, 0, 0.3, 0.0, 0.0, backend)
        torch.library.opcheck(op, (*leaves, *rest))


@pytest.mark.parametrize("backend", MOST)
def test_a_block_copies_no_heads(backend: str, device: torch.device) -> None:
    """Neither forward nor backward of a block copies a [B, H, T, D] tensor."""
    block = GPTBlock(32, 4, num_kv_heads=2, device=device)
    x = torch.randn(2, 7, 32, device=device, requires_grad=True)
    seen: list[bool] = []

    def looked_at(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].grad_fn.name().startswith("View"))

    block.out_proj.register_forward_pre_hook(looked_at)
    cos = sin = torch.ones(7, 4, device=device)
    with fused_lm.use_backend(backend):
        block(x, rotary=(cos, sin)).sum().backward()
    assert seen == [True]


def test_which_order_a_tensor_has() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert not rows_first(x) and rows_first(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert not rows_first(x[:, :1, :1].expand(2, 3, 4, 5)), "neither first: as it is named"
