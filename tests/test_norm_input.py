"""A linear layer that runs the norm before it again, instead of keeping the norm's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_lm
from fused_lm import NormInput

KERNELS = ("reference", "triton")
BF16 = torch.bfloat16
C, F = 24, 40


def parameters(
    device: torch.device, dtype: torch.dtype = torch.float32, C: int = C, F: int = F
) -> list[Tensor]:
    """stream, norm weight and bias, up and down."""
    shapes = ((3, 5, C), (C,), (C,), (F, C), (C, F))
    return [(torch.randn(s, device=device) / 2).to(dtype).requires_grad_() for s in shapes]


def norm_ffn(again: bool, rms: bool, *tensors: Tensor) -> Tensor:
    stream, weight, bias, up, down = tensors
    x: Any
    if rms:
        x = fused_lm.rms_norm(stream, weight, eps=1e-5)
    else:
        x = fused_lm.layer_norm(stream, weight, bias)
    source = NormInput(x, stream, weight, None if rms else bias, 1e-5, rms) if again else None
    return fused_lm.ffn(x, up, down, activation="silu", recompute=True, x_norm=source)


def norm_linear(again: bool, rms: bool, *tensors: Tensor) -> Tensor:
    stream, weight, bias, up, _ = tensors
    x: Any
    if rms:
        x = fused_lm.rms_norm(stream, weight, eps=1e-5)
    else:
        x = fused_lm.layer_norm(stream, weight, bias)
    source = NormInput(x, stream, weight, None if rms else bias, 1e-5, rms) if again else None
    return fused_lm.linear_act(x, up, activation="none", x_norm=source)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], *flags: bool) -> list[Tensor]:
    y = function(*flags, *tensors)
    found = torch.autograd.grad(y.square().sum(), tensors, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("function", [norm_ffn, norm_linear])
def test_gradients_equal_to_the_bit(
    function: Callable[..., Tensor],
    rms: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    tensors = parameters(device, dtype)
    with fused_lm.use_backend(backend):
        kept = gradients(function, tensors, False, rms)
        again = gradients(function, tensors, True, rms)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_norms_output_is_not_kept(backend: str, device: torch.device) -> None:
    tensors = parameters(device)
    sizes = {}
    for again in (False, True):
        saved: dict[int, int] = {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            fused_lm.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            y = norm_ffn(again, False, *tensors)
        sizes[again] = sum(saved.values())
        del y
    assert sizes[False] - sizes[True] == 15 * C * 4


@pytest.mark.parametrize("backend", KERNELS)
def test_the_stream_may_not_change_in_between(backend: str, device: torch.device) -> None:
    tensors = parameters(device)
    stream = tensors[0].detach().clone()
    with fused_lm.use_backend(backend):
        y = norm_ffn(True, False, stream, *tensors[1:])
    stream.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", [norm_ffn, norm_linear])
def test_second_derivatives_follow_the_norm(function: Callable[..., Tensor]) -> None:
    tensors = parameters(torch.device("cpu"), torch.float64, C=6, F=7)
    with fused_lm.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *t: function(True, False, *t)[:1, :2], tensors, atol=1e-4
        )


def test_compiled_and_pytorch_ignore_it(device: torch.device) -> None:
    tensors = parameters(device)
    with fused_lm.use_backend("reference"):
        compiled = torch.compile(norm_ffn, fullgraph=True, backend="aot_eager")
        results = [gradients(f, tensors, True, False) for f in (norm_ffn, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with fused_lm.use_backend("pytorch"):
        results = [gradients(norm_ffn, tensors, again, False) for again in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_makes_the_narrow_input_again(backend: str, device: torch.device) -> None:
    tensors = parameters(device)
    with fused_lm.use_backend(backend), torch.autocast(device.type, BF16):
        kept = gradients(norm_ffn, tensors, False, False)
        again = gradients(norm_ffn, tensors, True, False)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    stream, weight, bias, up, down = parameters(torch.device("cpu"))
    for parts in ((stream[:1], weight, bias), (stream, weight[:3], bias)):
        with pytest.raises(ValueError, match="stream as x and parameters"):
            fused_lm.ffn(stream, up, down, x_norm=NormInput(stream, *parts, 1e-5, False))
        with pytest.raises(ValueError, match="stream as x and parameters"):
            fused_lm.linear_act(stream, up, x_norm=NormInput(stream, *parts, 1e-5, False))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_stream_wider_than_the_kernels_is_normalised_as_wide(
    backend: str, device: torch.device
) -> None:
    """fp64 around 1000: in fp32 the centred values would keep three digits."""
    tensors = parameters(device)
    stream = 1000 + 1e-3 * torch.randn(3, 5, C, device=device, dtype=torch.float64)
    x: Any = fused_lm.layer_norm(stream, tensors[1].double(), tensors[2].double())
    x = x.float().detach()
    grads = []
    for again in (False, True):
        source = NormInput(x, stream, tensors[1].double(), tensors[2].double(), 1e-5, False)
        with fused_lm.use_backend(backend):
            y = fused_lm.linear_act(x, tensors[3], x_norm=source if again else None)
        grads.append(torch.autograd.grad(y.sum(), tensors[3])[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_hook_may_change_the_input(backend: str, device: torch.device) -> None:
    """Then what the layer read is no longer what the norm returned."""
    block = fused_lm.nn.GPTBlock(C, 4).to(device)
    block.ffn.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = torch.randn(2, 5, C, device=device)
    grads = []
    for recompute in (False, True):
        block.recompute = recompute
        with fused_lm.use_backend(backend):
            grads.append(torch.autograd.grad(block(x).sum(), block.ffn.up.weight)[0])
    assert torch.equal(*grads)
