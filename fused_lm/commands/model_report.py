"""``fused-lm doctor --model``: a model's size, and what its training keeps between the passes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_lm.commands.errors import UserError, need_extra, one_sentence
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.nn.memory import ratio, saved_for_backward
from fused_lm.nn.transformer import GPTBlock

_GPT2 = {"vocab_size": 50257, "context": 1024, "dropout": 0.1, "activation": "gelu_tanh"}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "num_layers": 12, "embed_dim": 768, "num_heads": 12},
    "gpt2-medium": {**_GPT2, "num_layers": 24, "embed_dim": 1024, "num_heads": 16},
    "gpt2-large": {**_GPT2, "num_layers": 36, "embed_dim": 1280, "num_heads": 20},
    "gpt2-xl": {**_GPT2, "num_layers": 48, "embed_dim": 1600, "num_heads": 25},
}
"""Radford et al. 2019, table 2."""

ACTIVATION_BYTES = 2
"""bf16 or fp16."""


def config_of(name: str) -> GPTConfig:
    """The config of a preset or of a checkpoint.

    Raises:
        UserError: Neither.
    """
    if name in PRESETS:
        return GPTConfig(**PRESETS[name])
    if not Path(name).exists():
        raise UserError(f"no model {name!r}: expected {', '.join(PRESETS)} or a checkpoint's path")
    try:
        from fused_lm.lm.checkpoint import CheckpointError, read_checkpoint

        with one_sentence(CheckpointError, ValueError):
            return GPTConfig.from_dict(read_checkpoint(name).config)
    except ImportError as error:
        raise need_extra(error) from error


def report(name: str) -> dict[str, Any]:
    """As plain data: parameters, and bytes a token that one block keeps for its backward."""
    config = config_of(name)
    model = GPT(config, device="meta")
    block = model.blocks[0]
    assert isinstance(block, GPTBlock)
    items = saved_for_backward(block, ACTIVATION_BYTES, rotary=config.positions == "rotary")
    ours, stock = (sum(getattr(item, side) for item in items) for side in ("ours", "stock"))
    return {
        "model": name,
        "config": config.to_dict(),
        "parameters": model.num_parameters(),
        "saved_bytes_per_token_and_block": {
            "items": [asdict(item) for item in items],
            "ours": ours,
            "stock": stock,
            "ratio": round(ratio(items), 4),
        },
        "saved_bytes_per_sequence": {
            side: total * config.num_layers * config.context
            for side, total in (("ours", ours), ("stock", stock))
        },
    }


def rows_of(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) of the table."""
    saved = found["saved_bytes_per_token_and_block"]
    rows = [
        [item["what"], f"{item['ours']:,}", f"{item['stock']:,}"]
        for item in saved["items"]
        if item["ours"] or item["stock"]
    ]
    rows.append(["a token and block", f"{saved['ours']:,}", f"{saved['stock']:,}"])
    whole = found["saved_bytes_per_sequence"]
    config = found["config"]
    rows.append(
        [
            f"a sequence of {config['context']:,} tokens, {config['num_layers']} blocks",
            f"{whole['ours'] / 2**30:.2f} GiB",
            f"{whole['stock'] / 2**30:.2f} GiB",
        ]
    )
    title = (
        f"{found['model']}: {found['parameters'] / 1e6:.1f} M parameters. Bytes kept for the "
        f"backward in 16 bits, kernels / stock modules = {saved['ratio']:.2f}"
    )
    return title, ["kept", "kernels", "stock modules"], rows
