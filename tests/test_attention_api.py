"""Attention as torch sees it: errors, opcheck, compile, transforms, torch's own signature, other
layouts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_lm
from tests import oracle

KERNELS = ("reference", "triton")


def _qkv(device: torch.device, T: int = 12, S: int = 12, H: int = 2) -> list[Tensor]:
    shapes = ((2, H, T, 8), (2, 2, S, 8), (2, 2, S, 8))
    return [torch.randn(shape, device=device) for shape in shapes]


x = torch.zeros(2, 2, 12, 8)
BAD_CALLS = [
    ((x[0], x, x), {}, ValueError, "takes [B, H, T, D] tensors, got q [2, 12, 8]"),
    ((x, x[:1], x), {}, ValueError, "must share B and D"),
    ((x[..., :0], x[..., :0], x), {}, ValueError, "D >= 1"),
    ((x, x, x[:, :, :5]), {}, ValueError, "v must be [B, Hkv, S, Dv]"),
    ((x, x[:, :1].expand(2, 3, 12, 8), x), {}, ValueError, "heads of k must divide"),
    ((x, x.double(), x), {}, TypeError, "one dtype of float16"),
    ((x.int(), x.int(), x.int()), {}, TypeError, "one dtype of float16"),
    ((x, x.to("meta"), x), {}, TypeError, "on one device, got q on cpu, k on meta"),
    ((x, x, x), {"mask": torch.zeros(12, 12)}, TypeError, "pass float masks as bias"),
    ((x, x, x), {"mask": torch.zeros(12, 12, dtype=torch.int64)}, TypeError, "mask must be bool"),
    ((x, x, x), {"mask": torch.ones(3, 12) > 0}, ValueError, "broadcastable to [B, H, T, S]"),
    ((x, x, x), {"key_mask": torch.ones(12, 2) > 0}, ValueError, "key_mask must be [B, S]"),
    ((x, x, x), {"key_mask": torch.ones(2, 12)}, TypeError, "key_mask must be bool"),
    ((x, x, x), {"bias": torch.ones(12, 12, dtype=torch.bool)}, TypeError, "pass bool as mask"),
    ((x, x, x), {"bias": torch.ones(2, 2, 2, 12, 12)}, ValueError, "bias must be broadcastable"),
    ((x, x[:, :, :5], x[:, :, :5]), {"causal": True}, ValueError, "causal='top_left'"),
    ((x, x[:, :, :5], x[:, :, :5]), {"causal": 1}, ValueError, "causal='top_left'"),
    ((x, x, x), {"causal": "lower"}, ValueError, "'bottom_right', got 'lower'"),
    ((x, x, x), {"window": (-1, 0)}, ValueError, "window must be (left, right)"),
    ((x, x, x), {"window": 3}, ValueError, "window must be (left, right)"),
    ((x, x, x), {"softcap": -1.0}, ValueError, "softcap must be finite"),
    ((x, x, x), {"dropout_p": 1.5}, ValueError, "between 0 and 1, got 1.5"),
    ((x, x, x), {"rng": torch.zeros(4)}, TypeError, "rng must be int64"),
    ((x, x, x), {"rng": torch.zeros(2, dtype=torch.int64)}, ValueError, "rng must be [4]"),
]  # fmt: skip


@pytest.mark.parametrize("args, options, error, text", BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(args: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        fused_lm.attention(*args, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend: str, device: torch.device) -> None:
    q, k, v = (t[:1].requires_grad_() for t in _qkv(device, H=4))
    bias = torch.randn(1, 4, 12, 12, device=device, requires_grad=True)
    rng = torch.tensor([1, 2, 0, 0], device=device)
    tail = (None, None, bias, rng, None, 0, 0.3, 2.0, 0.1)
    torch.library.opcheck(torch.ops.fused_lm.attention_fwd.default, (q, k, v, *tail, backend))
    with fused_lm.use_backend(backend):
        out, lse = fused_lm.attention(q, k, v, return_lse=True)
    torch.library.opcheck(
        torch.ops.fused_lm.attention_bwd.default,
        (torch.randn_like(out), torch.randn_like(lse), *(t.detach() for t in (q, k, v, out, lse)),
         *tail, True, backend),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fused_lm.attention_weights_fwd.default,
        (q, k, lse.detach(), *tail, True, backend),
    )


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"softcap": 2.0, "return_lse": True}], ids=str
)
def test_compiles_fullgraph(backend: str, options: dict[str, Any], device: torch.device) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = fused_lm.attention(q, k, v, **options)
        return sum(t.square().sum() for t in (result if isinstance(result, tuple) else (result,)))

    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in _qkv(device)]
    with fused_lm.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = compiled(*inputs)
        eager = step(*inputs)
        gradients = [torch.autograd.grad(total, inputs) for total in (got, eager)]
    torch.testing.assert_close(got, eager, rtol=0, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right"}, {"window": (3, 0)}], ids=str)
def test_compiles_with_dynamic_shapes(
    backend: str, options: dict[str, Any], device: torch.device
) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with fused_lm.use_backend(backend):
        compiled = torch.compile(
            lambda q, k, v: fused_lm.attention(q, k, v, **options),
            fullgraph=True, dynamic=True, backend=counter,
        )  # fmt: skip
        for T, S in ((5, 9), (7, 7), (6, 12)):
            q, k, v = _qkv(device, T=T, S=S)
            torch.testing.assert_close(compiled(q, k, v), fused_lm.attention(q, k, v, **options))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", KERNELS)
def test_a_checkpointed_forward_draws_the_same_mask(backend: str, device: torch.device) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(device))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_lm.attention(q, k, v, dropout_p=0.5)

    gradients = []
    with fused_lm.use_backend(backend):
        for reentrant in (None, False, True):
            torch.manual_seed(3)
            if reentrant is None:
                out = step(q, k, v)
            else:
                out = checkpoint(step, q, k, v, use_reentrant=reentrant)
            gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)) if not reentrant
                             else _by_backward(out.square().sum(), (q, k, v)))  # fmt: skip
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def _by_backward(total: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Reentrant checkpoints refuse ``torch.autograd.grad``."""
    total.backward()
    return tuple(t.grad for t in leaves)


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_transforms(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_lm.attention(q, k, v, causal=True).sin().sum()

    with fused_lm.use_backend(backend):
        gradient = torch.func.grad(total)(q, k, v)
        batched = torch.func.vmap(lambda a, b, c: fused_lm.attention(a[None], b[None], c[None])[0])(
            q, k, v
        )
        _, tangent = torch.func.jvp(lambda a: fused_lm.attention(a, k, v, softcap=2.0), (q,), (k,))
    leaf = q.clone().requires_grad_()
    visible = torch.ones(12, 12, dtype=torch.bool, device=device).tril().expand(2, 2, 12, 12)
    expected = torch.autograd.grad(
        oracle.attention(leaf, k, v, visible=visible)[0].sin().sum(), leaf
    )
    torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(batched, oracle.attention(q, k, v)[0])
    _, wanted = torch.func.jvp(lambda a: oracle.attention(a, k, v, softcap=2.0)[0], (q,), (k,))
    torch.testing.assert_close(tangent, wanted)


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_autocast_casts_as_torch_does(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device)
    with fused_lm.use_backend(backend), torch.autocast(device.type, dtype=torch.bfloat16):
        out = fused_lm.attention(q, k.bfloat16(), v)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


SDPA_CALLS = [
    ("plain", [(2, 3, 5, 8)] * 3, {}),
    ("no head axis", [(2, 5, 8)] * 3, {}),
    ("one matrix", [(5, 8)] * 3, {}),
    ("five dims", [(2, 2, 3, 5, 8)] * 3, {}),
    ("causal, T != S", [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], {"is_causal": True}),
    ("grouped", [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)], {"enable_gqa": True}),
    ("bool mask", [(2, 3, 5, 8)] * 3, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}),
    ("float mask, 3-D", [(2, 5, 8)] * 3, {"attn_mask": torch.randn(2, 5, 5)}),
    ("mask of a lead dim", [(2, 3, 4, 5, 8)] * 3, {"attn_mask": torch.randn(3, 1, 5, 5)}),
    ("scale", [(2, 3, 5, 8)] * 3, {"scale": 0.2}),
    ("broadcast batch", [(2, 3, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)], {}),
]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name, shapes, options", SDPA_CALLS, ids=[c[0] for c in SDPA_CALLS])
def test_sdpa_means_what_torch_means(
    name: str,
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    backend: str,
    device: torch.device,
) -> None:
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    options = {n: o.to(device) if isinstance(o, Tensor) else o for n, o in options.items()}
    with fused_lm.use_backend(backend):
        got = fused_lm.scaled_dot_product_attention(q, k, v, **options)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, expected)


def test_sdpa_errors() -> None:
    with pytest.raises(ValueError, match="attn_mask or is_causal"):
        fused_lm.scaled_dot_product_attention(x, x, x, torch.ones(12, 12) > 0, is_causal=True)
    with pytest.raises(ValueError, match="enable_gqa is False"):
        fused_lm.scaled_dot_product_attention(x.repeat(1, 2, 1, 1), x, x)
