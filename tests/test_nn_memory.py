"""What a block keeps for its backward: the computed bytes are the measured ones, for both sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_lm
from fused_lm.lm import GPT, GPTConfig
from fused_lm.nn import GPTBlock
from fused_lm.nn.memory import ratio, saved_for_backward
from tests.gpu import TRITON_LATER

KERNELS = ("reference", "triton")
MOST = ("reference", *TRITON_LATER)
B, T, C, H = 2, 24, 32, 4


RNG_BYTES = 32


def saved_bytes(run: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes of the distinct storages that ``run`` saves, without those of ``parameters``."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)  # so that no address is used twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(n for at, n in storages.items() if at not in known)


def bytes_of_a_block(config: dict[str, Any], device: torch.device) -> int:
    """What a stack of three blocks keeps more than one of two."""
    totals = []
    for layers in (2, 3):
        model = GPT(GPTConfig(num_layers=layers, **config)).to(device)
        tokens = torch.randint(16, (B, T), device=device)
        run = partial(model.features, tokens)
        totals.append(saved_bytes(run, list(model.parameters())))
    return totals[1] - totals[0]


CONFIGS = {
    "gelu": {},
    "gelu, dropout": {"dropout": 0.1},
    "relu": {"activation": "relu"},
    "swiglu, rms norm, grouped queries, rotary": {
        "activation": "swiglu", "norm": "rms_norm", "num_kv_heads": 2, "positions": "rotary",
    },
    "post-norm": {"norm_first": False, "dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_computed_is_measured(options: dict[str, Any], backend: str, device: torch.device) -> None:
    config = {"vocab_size": 16, "context": T, "embed_dim": C, "num_heads": H, **options}
    block = GPT(GPTConfig(num_layers=1, **config)).blocks[0]
    assert isinstance(block, GPTBlock)
    items = saved_for_backward(block, 4, rotary=options.get("positions") == "rotary")
    with fused_lm.use_backend(backend):
        measured = bytes_of_a_block(config, device)
    states = 3 * RNG_BYTES if options.get("dropout") else 0
    assert measured == B * T * sum(item.ours for item in items) + states


class StockBlock(nn.Module):
    """A pre-norm GELU block of stock modules."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down, self.act = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.GELU()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out_proj(out.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stock_is_measured_too(dropout: float) -> None:
    def stack(layers: int) -> int:
        model = nn.Sequential(*(StockBlock(dropout) for _ in range(layers)))
        x = torch.randn(B, T, C, requires_grad=True)
        return saved_bytes(partial(model, x), list(model.parameters()))

    items = saved_for_backward(GPTBlock(C, H, dropout=dropout), 4, mask_bytes=4)
    assert stack(3) - stack(2) == B * T * sum(item.stock for item in items)


@pytest.mark.parametrize("size", [(768, 12), (1024, 16), (1600, 25), (4096, 32)])
def test_at_most_three_fifths_of_stock(size: tuple[int, int]) -> None:
    """A pre-norm GELU block with dropout in 16 bits, as GPT-2 has it."""
    block = GPTBlock(*size, dropout=0.1, device="meta")
    assert ratio(saved_for_backward(block, 2)) <= 0.6
    kept = GPTBlock(*size, dropout=0.1, recompute=False, device="meta")
    assert ratio(saved_for_backward(kept, 2)) > 0.9  # so recomputing is where it comes from


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_recomputing_changes_no_number(norm: str, backend: str, device: torch.device) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        block = GPTBlock(C, H, norm=norm, dropout=0.2, recompute=recompute).to(device)
        x = torch.randn(B, T, C, device=device, requires_grad=True)
        with fused_lm.use_backend(backend):
            y = block(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        results.append([y, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
