"""FeedForward and GPTBlock against plain PyTorch, in fp64 and in stock modules."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_lm
from fused_lm.nn.feedforward import ACTIVATIONS, FeedForward, default_ffn_dim
from fused_lm.nn.transformer import GPTBlock
from fused_lm.tolerance import check_close, max_error

B, T, C, H, FFN = 2, 7, 16, 4, 24

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
}


def plain_ffn(params: dict[str, Tensor], x: Tensor, activation: str) -> Tensor:
    hidden = F.linear(x, params["ffn.up.weight"], params.get("ffn.up.bias"))
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
    if activation in gates:
        gate, value = hidden.chunk(2, dim=-1)
        hidden = PLAIN[gates[activation]](gate) * value
    else:
        hidden = PLAIN[activation](hidden)
    return F.linear(hidden, params["ffn.down.weight"], params.get("ffn.down.bias"))


def plain_attention(
    block: GPTBlock, params: dict[str, Tensor], x: Tensor, visible: Tensor
) -> Tensor:
    qkv = F.linear(x, params["qkv.weight"], params.get("qkv.bias"))
    sizes = [heads * block.head_dim for heads in (block.num_heads, *(block.num_kv_heads,) * 2)]
    q, k, v = (part.unflatten(-1, (-1, block.head_dim)) for part in qkv.split(sizes, dim=-1))
    group = block.num_heads // block.num_kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(block.head_dim)
    if block.softcap:
        scores = block.softcap * torch.tanh(scores / block.softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
    out = torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2)
    return F.linear(out, params["out_proj.weight"], params.get("out_proj.bias"))


def plain_block(
    block: GPTBlock, params: dict[str, Tensor], x: Tensor, visible: Tensor | None = None
) -> Tensor:
    """The block's formula in plain operators, in the dtype of ``params`` (dropout 0)."""

    def norm(name: str, y: Tensor) -> Tensor:
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        if isinstance(block.norm1, fused_lm.nn.RMSNorm):
            return F.rms_norm(y, (C,), weight, 1e-5)
        return F.layer_norm(y, (C,), weight, bias, 1e-5)

    activation = block.ffn.activation
    if visible is None:
        visible = torch.ones(T, T, dtype=torch.bool).tril()
    if block.norm_first:
        x = x + plain_attention(block, params, norm("norm1", x), visible)
        return x + plain_ffn(params, norm("norm2", x), activation)
    x = norm("norm1", x + plain_attention(block, params, x, visible))
    return norm("norm2", x + plain_ffn(params, x, activation))


def randomised(module: nn.Module) -> nn.Module:
    """Weights of ordinary size everywhere, so that no bias or gain hides behind 0 or 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.3)
    return module


def with_gradients(
    run: Callable[[dict[str, Tensor], Tensor], Tensor],
    block: nn.Module,
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Output and the gradients of x and every parameter, with all of them in ``dtype``."""
    params = {n: p.detach().to(dtype).requires_grad_() for n, p in block.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    out = run(params, x)
    out.backward(dy.to(out.dtype))
    gradients = {f"d{name}": p.grad for name, p in {**params, "x": x}.items()}
    return {"out": out.detach(), **gradients}


def check_block(block: GPTBlock, visible: Tensor | None = None, **options: Tensor) -> None:
    x, dy = torch.randn(B, T, C), torch.randn(B, T, C)

    def ours(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, params, (x,), options)

    def plain(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return plain_block(block, params, x, visible)

    got = with_gradients(ours, block, x, dy, torch.float32)
    same = with_gradients(plain, block, x, dy, torch.float32)
    exact = with_gradients(plain, block, x, dy, torch.float64)
    # One vector of 32 sums is too small a sample of a block's rounding to be its own yardstick.
    rounding = max(max_error(same[n], exact[n]) / float(exact[n].abs().max()) for n in exact)
    for name, value in got.items():
        near = (exact[name] * (1 + rounding)).to(value.dtype)
        check_close(value, near, exact[name], name)


CASES = list(
    itertools.product(
        (True, False), ACTIVATIONS, (True, False), (None, 2), ("layer_norm", "rms_norm")
    )
)


@pytest.mark.parametrize(("norm_first", "activation", "bias", "num_kv_heads", "norm"), CASES)
def test_block_equals_plain_formula(
    norm_first: bool, activation: str, bias: bool, num_kv_heads: int | None, norm: str
) -> None:
    block = GPTBlock(
        C,
        H,
        num_kv_heads=num_kv_heads,
        ffn_dim=FFN,
        activation=activation,
        norm=norm,
        norm_first=norm_first,
        bias=bias,
    )
    check_block(randomised(block))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_window_softcap_key_mask_and_head_dim(backend: str, norm_first: bool) -> None:
    block = GPTBlock(
        C, H, num_kv_heads=1, head_dim=6, norm_first=norm_first, window=(2, 0), softcap=3.0
    )
    key_mask = torch.ones(B, T, dtype=torch.bool)
    key_mask[1, 2] = False
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    visible = (distance >= 0) & (distance <= 2) & key_mask[:, None, None, :]
    with fused_lm.use_backend(backend):
        check_block(randomised(block), visible, key_mask=key_mask)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_equals_stock_encoder_layer(norm_first: bool, activation: str) -> None:
    """The same weights in ``nn.TransformerEncoderLayer`` with a causal mask."""
    block = randomised(GPTBlock(C, H, ffn_dim=FFN, activation=activation, norm_first=norm_first))
    layer = nn.TransformerEncoderLayer(
        C, H, FFN, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    ours = block.state_dict()
    names = {"qkv.": "self_attn.in_proj_", "out_proj.": "self_attn.out_proj."}
    names |= {"ffn.up.": "linear1.", "ffn.down.": "linear2."}
    stock = {}
    for name, value in ours.items():
        for prefix, theirs in names.items():
            name = name.replace(prefix, theirs)
        stock[name] = value
    layer.load_state_dict(stock)
    x = torch.randn(B, T, C)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    exact = layer.double()(x.double(), src_mask=hidden)
    check_close(block(x), layer.float()(x, src_mask=hidden), exact, "block")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_block_is_causal_bitwise(backend: str, norm_first: bool) -> None:
    block = randomised(GPTBlock(C, H, norm_first=norm_first))
    x = torch.randn(B, T, C)
    with fused_lm.use_backend(backend), torch.no_grad():
        before = block(x)
        for t in range(T - 1):
            changed = x.clone()
            changed[:, t + 1 :] = torch.randn(B, T - t - 1, C)
            after = block(changed)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after[:, t + 1], before[:, t + 1])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_drops_the_branches_and_only_in_training(backend: str) -> None:
    block = randomised(GPTBlock(C, H, dropout=1.0, attention_dropout=0.0))
    x = torch.randn(B, T, C)
    with fused_lm.use_backend(backend):
        assert torch.equal(block(x), x)
        assert not torch.equal(block.eval()(x), x)


def test_attention_dropout_alone_changes_the_block() -> None:
    block = randomised(GPTBlock(C, H, attention_dropout=0.5))
    x = torch.randn(B, T, C)
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    # Row 0 sees one key: its weight is dropped or doubled, and stays finite either way.
    assert torch.isfinite(first).all()
    block.eval()
    assert torch.equal(block(x), block(x))


def test_feedforward_drops_after_its_last_linear() -> None:
    ffn = randomised(FeedForward(C, dropout=1.0))
    x = torch.randn(3, C)
    assert torch.equal(ffn(x), torch.zeros(3, C))
    assert torch.equal(ffn.eval()(x), ffn(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(C,), (0, C), (2, 3, 1, C)], ids=["row", "empty", "4-D"])
def test_feedforward_takes_any_leading_shape(activation: str, shape: tuple[int, ...]) -> None:
    ffn = randomised(FeedForward(C, FFN, activation=activation))
    x = torch.randn(shape)
    params = {f"ffn.{n}": p for n, p in ffn.named_parameters()}
    wide = {name: p.double() for name, p in params.items()}
    same, exact = plain_ffn(params, x, activation), plain_ffn(wide, x.double(), activation)
    check_close(ffn(x), same, exact, activation)


def test_default_ffn_widths() -> None:
    assert [default_ffn_dim(C, "gelu") for C in (1, 384)] == [4, 1536]
    assert [default_ffn_dim(C, "swiglu") for C in (1, 24, 25, 384, 768)] == [
        64,
        64,
        128,
        1024,
        2048,
    ]
    assert FeedForward(24, activation="geglu").up.weight.shape == (128, 24)


def compiled_and_eager(backend: str, block: GPTBlock, x: Tensor) -> None:
    dy = torch.randn_like(x)

    def run(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        block.to(dtype).zero_grad(set_to_none=True)
        leaf = x.detach().to(dtype).requires_grad_()
        out = call(leaf)
        out.backward(dy.to(dtype))
        gradients = {f"d{n}": p.grad.clone() for n, p in block.named_parameters()}
        return {"out": out.detach(), "dx": leaf.grad, **gradients}

    exact = run(block, torch.float64)
    eager = run(block, torch.float32)
    torch._dynamo.reset()
    compiled = run(torch.compile(block, fullgraph=True, backend=backend), torch.float32)
    for name, value in compiled.items():
        check_close(value, eager[name], exact[name], name)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_compiled_fullgraph_equals_eager(kernels: str, norm_first: bool) -> None:
    block = randomised(GPTBlock(C, H, num_kv_heads=2, ffn_dim=FFN, norm_first=norm_first))
    with fused_lm.use_backend(kernels):
        compiled_and_eager("aot_eager", block, torch.randn(B, T, C))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_compiled_by_inductor_equals_eager() -> None:
    block = randomised(GPTBlock(C, H, ffn_dim=FFN, activation="swiglu", norm="rms_norm"))
    compiled_and_eager("inductor", block, torch.randn(B, T, C))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_ten_lengths_compile_at_most_three_times(kernels: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block = randomised(GPTBlock(C, H, ffn_dim=FFN))
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with fused_lm.use_backend(kernels):
        for length in (33, 2, 3, 8, 16, 17, 31, 32, 64, 1):
            x = torch.randn(B, length, C, requires_grad=True)
            out = compiled(x)
            out.sum().backward()
            assert out.shape == x.shape == x.grad.shape
    assert counter.frame_count <= 3


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast_is_as_accurate_as_torchs(norm_first: bool, norm: str) -> None:
    block = randomised(GPTBlock(C, H, norm=norm, norm_first=norm_first))
    x, dy = torch.randn(B, T, C), torch.randn(B, T, C)

    def ours(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(block, params, (x,))

    def stock(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain_block(block, params, x)

    got = with_gradients(ours, block, x, dy, torch.float32)
    same = with_gradients(stock, block, x, dy, torch.float32)
    exact = with_gradients(lambda p, x: plain_block(block, p, x), block, x, dy, torch.float64)
    for name, value in got.items():
        assert value.dtype == torch.float32
        check_close(value.bfloat16(), same[name].bfloat16(), exact[name], name)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_checkpointing_repeats_the_dropout(backend: str, norm_first: bool) -> None:
    block = randomised(GPTBlock(C, H, dropout=0.3, norm_first=norm_first))
    x = torch.randn(B, T, C)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        block.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad for p in block.parameters())]

    with fused_lm.use_backend(backend):
        plain = gradients(block)
        again = gradients(lambda y: checkpoint(block, y, use_reentrant=False))
    for wanted, got in zip(plain, again, strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_func_grad_and_vmap_give_per_sample_gradients(norm: str) -> None:
    block = randomised(GPTBlock(C, H, ffn_dim=FFN, norm=norm))
    xs = torch.randn(3, T, C)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, params, (x[None],)).square().sum()

    def looped(dtype: torch.dtype) -> dict[str, Tensor]:
        params = {n: p.detach().to(dtype).requires_grad_() for n, p in block.named_parameters()}
        rows = [torch.autograd.grad(loss(params, x), list(params.values())) for x in xs.to(dtype)]
        return dict(zip(params, map(torch.stack, zip(*rows, strict=True)), strict=True))

    params = {n: p.detach() for n, p in block.named_parameters()}
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, xs)
    same, exact = looped(torch.float32), looped(torch.float64)
    for name, value in got.items():
        check_close(value, same[name], exact[name], name)


def test_vmap_over_an_ensemble_of_blocks() -> None:
    blocks = [randomised(GPTBlock(C, H, ffn_dim=FFN)) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(blocks)
    x = torch.randn(B, T, C)

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(blocks[0], (params, buffers), (x,))

    got = torch.func.vmap(call)(params, buffers)
    one_by_one = torch.stack([block(x) for block in blocks])
    exact = torch.stack([block.double()(x.double()) for block in blocks])
    check_close(got, one_by_one, exact, "ensemble")


def test_state_dict_round_trip() -> None:
    options = {"num_kv_heads": 2, "activation": "geglu", "bias": False}
    first, second = GPTBlock(C, H, **options), GPTBlock(C, H, **options)
    second.load_state_dict(first.state_dict())
    x = torch.randn(B, T, C)
    assert torch.equal(first(x), second(x))
    assert not any(name.endswith("bias") for name in first.state_dict())


BAD_BLOCKS = [
    ({"num_heads": 3}, r"num_heads \(3\) must divide embed_dim \(16\)"),
    ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
    ({"num_heads": 0}, r"must be at least 1, got 16, 0 and 0"),
    ({"head_dim": 0}, r"head_dim must be at least 1, got 0"),
    ({"ffn_dim": 0}, r"ffn_dim must be at least 1"),
    ({"activation": "tanh"}, r"activation must be one of gelu, .*, got 'tanh'"),
    ({"norm": "batch"}, r"norm must be one of layer_norm, rms_norm, got 'batch'"),
    ({"dropout": 1.5}, r"dropout must be within 0 and 1, got 1.5"),
    ({"attention_dropout": -0.1}, r"attention_dropout must be within 0 and 1, got -0.1"),
    ({"dropout": float("nan")}, r"dropout must be within 0 and 1, got nan"),
    ({"eps": -1.0}, r"eps must not be negative, got -1.0"),
    ({"softcap": -2.0}, r"softcap must not be negative"),
    ({"window": 3}, r"window must be None or \(left, right\)"),
    ({"window": (-1, 0)}, r"each None or at least 0, got \(-1, 0\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD_BLOCKS)
def test_impossible_blocks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTBlock(**{"embed_dim": C, "num_heads": H, **options})
