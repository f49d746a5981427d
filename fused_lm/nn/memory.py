"""What a block keeps from its forward for its backward, in bytes a token: ours and stock modules'.

"Ours" is :class:`GPTBlock` with the kernels, inside a stack that hands the last add on to the next
block. "Stock" is the same block out of ``nn.LayerNorm``, ``nn.Linear``, ``nn.Dropout`` and
``F.scaled_dot_product_attention`` in its flash form. Parameters count for neither, nor do a few
bytes a call (the state of a dropout).
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_lm.nn.norm import RMSNorm
from fused_lm.nn.transformer import GPTBlock
from fused_lm.reference.activations import GATES
from fused_lm.reference.linear_act import keeps_pre

STATISTIC_BYTES = 4
MASK_BYTES = 1
"""A dropout mask of torch's on a GPU; on a CPU it is as wide as its input."""


@dataclass(frozen=True)
class Saved:
    """One tensor that is kept; bytes a token."""

    what: str
    ours: int
    stock: int


def saved_for_backward(
    block: GPTBlock, itemsize: int, *, rotary: bool = False, mask_bytes: int = MASK_BYTES
) -> list[Saved]:
    """Everything that one block of a stack keeps in training.

    Args:
        block: Its sizes and options count, not where it is.
        itemsize: Bytes of an activation: 2 for bf16 and fp16.
        rotary: Whether queries and keys are turned.
        mask_bytes: Of one element of a stock dropout mask.
    """
    C = block.embed_dim * itemsize
    heads, kv_heads = block.num_heads, block.num_kv_heads
    qkv = (heads + 2 * kv_heads) * block.head_dim * itemsize
    turned = (heads + kv_heads) * block.head_dim * itemsize if rotary else 0
    statistics = STATISTIC_BYTES * (1 if isinstance(block.norm1, RMSNorm) else 2)
    mask = block.embed_dim * mask_bytes if block.dropout else 0
    kept = 0 if block.recompute else C
    first, second = ("input", "output") if block.norm_first else ("output", "input")
    return [
        Saved(f"first norm's {first}", C, C),
        # After a post-norm block the first linear reads another block's norm.
        Saved(f"first norm's {second}", kept if block.norm_first else C, C),
        Saved("second norm's input", C, C),
        Saved("second norm's output", kept, C),
        Saved("norms' statistics", 2 * statistics, 2 * statistics),
        Saved("queries, keys, values", qkv + turned, qkv + turned),
        Saved(
            "attention's output",
            heads * block.head_dim * itemsize,
            heads * block.head_dim * itemsize,
        ),
        Saved("attention's log-sum-exp", heads * STATISTIC_BYTES, heads * STATISTIC_BYTES),
        *_ffn(block, itemsize),
        Saved("dropout masks", 0, 2 * mask),
    ]


def _ffn(block: GPTBlock, itemsize: int) -> list[Saved]:
    F, activation = block.ffn.ffn_dim * itemsize, block.ffn.activation
    gated = activation in GATES
    pre = 2 * F if gated else F
    hidden = 0 if block.recompute and keeps_pre(activation) else F
    return [
        Saved(
            "pre-activation",
            pre if keeps_pre(activation) else 0,
            0 if activation == "relu" else pre,
        ),
        # A gate's function and its product with the value are two steps in stock modules, and
        # relu_squared is a relu that is squared.
        Saved("activation", hidden, 2 * F if gated or activation == "relu_squared" else F),
    ]


def ratio(items: list[Saved]) -> float:
    """Ours over stock."""
    return sum(item.ours for item in items) / sum(item.stock for item in items)
