"""Attention: what must hold whatever the numbers, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_lm
from fused_lm.reference.philox import dropout_scale, keep_mask
from fused_lm.tolerance import check_close, max_error
from tests import oracle

BACKENDS = ("reference", "pytorch", "triton")
KERNELS = ("reference", "triton")


def _qkv(device: torch.device, T: int = 40, S: int = 40, D: int = 16, H: int = 2) -> list[Tensor]:
    return [torch.randn(2, H, length, D, device=device) for length in (T, S, S)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_future_tokens_change_nothing(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device)
    with fused_lm.use_backend(backend):
        before = fused_lm.attention(q, k, v, causal=True)
        for t in (q, k, v):
            t[:, :, 21:] = torch.randn_like(t[:, :, 21:])
        after = fused_lm.attention(q, k, v, causal=True)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_bias_changes_nothing(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device)
    shift = torch.full((1, 1, 1, 1), 3.0, device=device)
    with fused_lm.use_backend(backend):
        plain, shifted = (fused_lm.attention(q, k, v, bias=b) for b in (None, shift))
    exact = oracle.attention(q.double(), k.double(), v.double())[0]
    check_close(shifted, plain, exact)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "one for all": lambda t: t[..., :1, :1],
    "one a row": lambda t: t[..., :1],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", MASKS)
def test_pytorch_is_given_dense_rows(
    layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels on a GPU refuse masks whose neighbours in a row are apart, or all one number."""
    given: list[Tensor] = []
    sdpa = F.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *args: Any, **options: Any) -> Tensor:
        given.append(mask)
        return sdpa(q, k, v, mask, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    q, k, v = _qkv(device, S=48)
    source = torch.randn(2, 1, 40, 48, device=device, requires_grad=True)
    bias = MASKS[layout](source)
    with fused_lm.use_backend("pytorch"):
        out = fused_lm.attention(q, k, v, bias=bias)
        fused_lm.attention(q, k, v, mask=bias > -1.0)
    assert [t.expand(2, 2, 40, 48).stride(-1) for t in given] == [1, 1]
    assert (given[0].data_ptr() == source.data_ptr()) == (layout == "dense"), "copied in vain"
    expected = oracle.attention(q, k, v, bias=bias)[0]
    got, wanted = (torch.autograd.grad(t.square().sum(), source)[0] for t in (out, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_is_copied(backend: str, device: torch.device) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(device, T=1, S=1))
    with fused_lm.use_backend(backend):
        out = fused_lm.attention(q, k, v)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    for got, copied in ((out, v), (dv, dout)):
        if backend == "pytorch" and got.is_cuda:  # in three products of TF32, 1 * v is no copy
            check_close(got, copied, copied.double())
        else:
            assert torch.equal(got, copied)
    # dP - delta is zero in exact arithmetic: what is left is the rounding of its two equal terms.
    terms = (dout.abs() * v.abs()).sum(-1).max() * torch.cat([q, k]).abs().max()
    for gradient in (dq, dk):
        assert gradient.abs().max() <= 4 * torch.finfo(torch.float32).eps * terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key_are_zero(backend: str, device: torch.device) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(device))
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)
    mask[7] = False
    with fused_lm.use_backend(backend):
        out = fused_lm.attention(q, k, v, mask=mask)
        nothing = fused_lm.attention(q, k, v, key_mask=torch.zeros_like(mask[:2]))
    dq, dk, dv = torch.autograd.grad(out.sum() + nothing.sum(), (q, k, v))
    assert torch.all(out[:, :, 7] == 0)
    assert torch.all(nothing == 0)
    assert torch.all(dq[:, :, 7] == 0)
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


def _worst_orders(q: Tensor, k: Tensor, v: Tensor, exact: tuple[Tensor, ...]) -> list[Tensor]:
    """out and lse of the plain formula with scale 1e3, in the order of summing q.k that errs most.

    The error of out is that of the few rows whose largest scores are close: a last bit there, which
    another order of the same sum turns, is 5e-4 of a weight.
    """
    orders = [torch.randperm(q.shape[3], device=q.device) for _ in range(8)]
    tried = [oracle.attention(q[..., order], k[..., order], v, scale=1e3) for order in orders]
    return [
        max((t[i] for t in tried), key=lambda near: max_error(near, exact[i])) for i in range(2)
    ]


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_scores(backend: str, device: torch.device) -> None:
    """Scores of +-1e4: the backward sees P through lse, whose rounding is a relative error of P."""
    inputs = [t.requires_grad_() for t in _qkv(device)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    with fused_lm.use_backend(backend):
        out, lse = fused_lm.attention(*inputs, scale=1e3, return_lse=True)
        # Every key twice: two weights of a half, and an lse that is no score.
        q, k = inputs[0], torch.cat([inputs[1]] * 2, dim=2)
        sums = fused_lm.attention(q, k, torch.ones_like(k), scale=1e3)
    exact = oracle.attention(*exact_inputs, scale=1e3)
    near = _worst_orders(*(t.detach() for t in inputs), exact)
    check_close(out, near[0], exact[0], "out")
    check_close(lse, near[1], exact[1], "lse")
    check_close(sums, torch.ones_like(sums), torch.ones_like(sums), "sum of a row's weights")
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dout)
    true = torch.autograd.grad(exact[0], exact_inputs, dout.double())
    rounding = 4 * torch.finfo(torch.float32).eps * float(exact[1].abs().max())
    q, k, v = (t.detach() for t in inputs)
    dP = (dout @ v.transpose(-1, -2)).abs().max()
    # P is nearly one-hot: dq and dk are differences of equal terms, at most T of them of this size.
    terms = {"q": 1e3 * dP * k.abs().max() * 40, "k": 1e3 * dP * q.abs().max() * 40}
    terms["v"] = true[2].abs().max()
    for name, ours, wanted in zip(("q", "k", "v"), got, true, strict=True):
        assert (ours - wanted).abs().max() <= rounding * terms[name], name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_empty_sizes(backend: str, sizes: tuple[int, ...], device: torch.device) -> None:
    B, H, T, S = sizes
    q, k, v = (torch.randn(B, H, n, 8, device=device, requires_grad=True) for n in (T, S, S))
    with fused_lm.use_backend(backend):
        out, lse = fused_lm.attention(q, k, v, return_lse=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and torch.all(out == 0)
    assert lse.shape == q.shape[:3] and torch.all(torch.isneginf(lse))
    assert [g.shape for g in gradients] == [t.shape for t in (q, k, v)]
    assert all(torch.all(g == 0) for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend: str, device: torch.device) -> None:
    """[B, T, H, D] views, a broadcast (stride 0) key, a transposed value, a stride-0 gradient."""
    q = torch.randn(2, 20, 2, 16, device=device).transpose(1, 2)
    k = torch.randn(1, 1, 20, 16, device=device).expand(2, 2, 20, 16)
    v = torch.randn(2, 2, 16, 20, device=device).transpose(2, 3)
    views = [t.requires_grad_() for t in (q, k, v)]
    copies = [
        t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in views
    ]
    results = []
    for tensors in (views, copies):
        with fused_lm.use_backend(backend):
            out = fused_lm.attention(*tensors, causal=True)
        dout = torch.ones(1, device=device).expand_as(out)
        results.append([out, *torch.autograd.grad(out, tensors, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_is_bitwise_repeatable(backend: str, device: torch.device) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(device, H=4))
    bias = torch.randn(1, 1, 40, 40, device=device, requires_grad=True)
    runs = []
    for _ in range(3):
        with fused_lm.use_backend(backend):
            out = fused_lm.attention(q, k[:, :2], v[:, :2], bias=bias)
        runs.append([out, *torch.autograd.grad(out.sum(), (q, k, v, bias))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("average", [True, False])
def test_weights(backend: str, average: bool, device: torch.device) -> None:
    q, k, v = _qkv(device, T=30, S=50)
    rng = torch.tensor([5, 6, 0, 0], device=device)
    options = {"causal": "bottom_right", "softcap": 3.0, "dropout_p": 0.4, "rng": rng}
    with fused_lm.use_backend(backend):
        _, lse = fused_lm.attention(q, k, v, return_lse=True, **options)
        got = fused_lm.attention_weights(q, k, lse, average_heads=average, **options)
    keep = keep_mask(rng, 2, 2, 30, 50, 0.4) * dropout_scale(0.4)
    visible = torch.ones(30, 50, dtype=torch.bool, device=device).tril(20).expand(2, 2, 30, 50)
    near, exact = (
        oracle.attention(
            *(t.to(dtype) for t in (q, k, v)), visible=visible, softcap=3.0, keep=keep
        )[2]
        for dtype in (torch.float32, torch.float64)
    )
    if average:
        near, exact = near.mean(1), exact.mean(1)
    check_close(got, near, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_weights_have_a_gradient(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device, T=6, S=7)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            _, lse = fused_lm.attention(q, k, v.to(q.dtype), return_lse=True)
            return (fused_lm.attention_weights(q, k, lse, average_heads=False),)

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (oracle.attention(q, k, v.to(q.dtype))[2],)

    oracle.check_against_oracle(ours, formula, [q, k], ["weights", "dq", "dk"])


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives(backend: str, device: torch.device) -> None:
    inputs = [t[:, :, :5, :4].clone() for t in _qkv(device)]
    direction = torch.randn_like(inputs[0])

    def curvature(run: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse = run(*tensors)
        first = torch.autograd.grad((out * out).sum() + lse.exp().sum(), tensors, create_graph=True)
        total = sum((g * direction.to(g.dtype)).sum() for g in first)
        return torch.autograd.grad(total, tensors)

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        with fused_lm.use_backend(backend):
            return fused_lm.attention(*tensors, causal=True, return_lse=True)

    def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
        visible = torch.ones(5, 5, dtype=torch.bool, device=device).tril().expand(2, 2, 5, 5)
        return oracle.attention(*tensors, visible=visible)[:2]

    got = curvature(ours, *(t.clone().requires_grad_() for t in inputs))
    near = curvature(formula, *(t.clone().requires_grad_() for t in inputs))
    exact = curvature(formula, *(t.double().requires_grad_() for t in inputs))
    for name, a, b, c in zip(("q", "k", "v"), got, near, exact, strict=True):
        check_close(a, b, c, name)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share(p: float) -> None:
    rng = fused_lm.make_rng("cpu")
    keep = keep_mask(rng, 2, 4, 64, 64, p).float()
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.mean()) - (1 - p)) < 5 * deviation
    assert not torch.equal(keep[0, 0], keep[0, 1]) and not torch.equal(keep[0], keep[1])


def test_dropout_mask_of_a_slice_is_the_slice_of_the_mask() -> None:
    """Tensor parallelism: a rank with heads 2 and 3, rows 8 to 15, draws what one device would."""
    rng = fused_lm.make_rng("cpu")
    whole = keep_mask(rng, 2, 4, 16, 20, 0.3)
    part = keep_mask(rng + torch.tensor([0, 0, 2, 8]), 2, 2, 8, 20, 0.3)
    assert torch.equal(part, whole[:, 2:, 8:])
