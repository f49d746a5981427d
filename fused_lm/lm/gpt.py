"""A GPT of fused_lm blocks: embedding, positions, blocks, final norm, head.

    h = drop(E[tokens] + P[positions])      rotary positions are inside the attention instead
    h = block_l(h)  for each layer
    logits = norm(h) @ W^T                  W = E when the head is tied; post-norm has no final norm

Initialised as GPT-2 (Radford et al. 2019): normal weights of std 0.02, those of projections that
end on the residual stream scaled by 1/sqrt(2 * layers), biases 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lm.lm.cache import KVCache
from fused_lm.lm.huggingface import HuggingFaceWeights
from fused_lm.nn.dropin import is_plain_linear
from fused_lm.nn.feedforward import ACTIVATIONS
from fused_lm.nn.norm import LayerNorm, RMSNorm, fused_add_norm, make_norm
from fused_lm.nn.positions import rotary_tables, sinusoidal_table
from fused_lm.nn.transformer import NORMS, GPTBlock
from fused_lm.ops.cross_entropy import cross_entropy
from fused_lm.ops.linear_cross_entropy import linear_cross_entropy
from fused_lm.ops.registration import autocast_dtype

POSITIONS = ("learned", "sinusoidal", "rotary")
INIT_STD = 0.02
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
}


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a :class:`GPT`; a wrong field raises a ValueError of one sentence.

    Args:
        vocab_size: V.
        context: Most tokens the model sees at once.
        num_layers, embed_dim, num_heads, num_kv_heads, ffn_dim, activation, norm, norm_first,
        dropout, bias: See :class:`fused_lm.nn.GPTBlock`; ``dropout`` also drops embeddings.
        positions: "learned" | "sinusoidal" | "rotary". Sinusoids have amplitude 1, so there (and
            only there) token embeddings are multiplied by sqrt(C), as in Vaswani et al. 2017.
        tie_head: Whether the head's weight is the embedding's.
    """

    vocab_size: int = 256
    context: int = 256
    num_layers: int = 6
    embed_dim: int = 384
    num_heads: int = 6
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    activation: str = "gelu"
    norm: str = "layer_norm"
    norm_first: bool = True
    positions: str = "learned"
    dropout: float = 0.0
    bias: bool = True
    tie_head: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, str(field.type), getattr(self, field.name))
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("positions", POSITIONS),
        ):
            if getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ValueError(
                    f"GPTConfig: {name} must be one of {', '.join(choices)}, got {got!r}"
                )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"GPTConfig: dropout must be within 0 and 1, got {self.dropout}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"GPTConfig: num_heads ({self.num_heads}) must divide embed_dim ({self.embed_dim})"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GPTConfig: num_kv_heads ({self.num_kv_heads}) must divide "
                f"num_heads ({self.num_heads})"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"GPTConfig: rotary positions need an even head dim, got {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """D = C / H."""
        return self.embed_dim // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: A field is unknown, missing, of a wrong type or impossible.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"GPTConfig: expected a mapping of fields, got {type(values).__name__}"
            )
        names = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in names)
        missing = [name for name in names if name not in values]
        if unknown:
            raise ValueError(
                f"GPTConfig: unknown fields {', '.join(unknown)}; known are {', '.join(names)}"
            )
        if missing:
            raise ValueError(f"GPTConfig: missing fields {', '.join(missing)}")
        return cls(**values)


def _check_field(name: str, kind: str, value: object) -> None:
    """Checks the type, and that sizes are at least 1; a bool is no number."""
    right_type = isinstance(value, _FIELD_TYPES[kind]) and (
        kind == "bool" or not isinstance(value, bool)
    )
    if not right_type:
        raise ValueError(
            f"GPTConfig: {name} must be {kind}, got {value!r} ({type(value).__name__})"
        )
    if isinstance(value, int) and kind.startswith("int") and value < 1:
        raise ValueError(f"GPTConfig: {name} must be at least 1, got {value}")


class GPT(HuggingFaceWeights):
    """Decoder-only language model, tokens [B, T] -> logits [B, T, V].

    A tied head has no module of its own: it reads ``tokens.weight``, so that a state dict holds the
    matrix once.

    Args:
        config: The model's shape.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        C = config.embed_dim
        self.tokens = nn.Embedding(config.vocab_size, C, **place)
        self.positions = (
            nn.Embedding(config.context, C, **place) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(_make_block(config, place) for _ in range(config.num_layers))
        self.norm = (
            make_norm(config.norm, C, 1e-5, config.bias, **place) if config.norm_first else None
        )
        self.head = (
            None if config.tie_head else nn.Linear(C, config.vocab_size, bias=False, **place)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws GPT-2's initial weights from torch's global generator, after ``to_empty()`` too."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends_on_stream = name.endswith(("out_proj", "ffn.down"))
                nn.init.normal_(module.weight, std=residual_std if ends_on_stream else INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (LayerNorm, RMSNorm)):
                module.reset_parameters()

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each of ``tokens``.

        Args:
            tokens: [B, T] integers of 0 .. V-1. The range is checked on a CPU only.
            cache: What the model has read before; ``tokens`` continue it and are added to it.
                Needs ``torch.no_grad()``.
        Returns:
            [B, T, V].
        Raises:
            ValueError: Not [B, T], longer than the context (cached tokens included), out of range.
            TypeError: Not integers.
        """
        x = self.features(tokens, cache=cache)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)

    def features(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """What the head reads, [B, T, C]; arguments and errors as :meth:`forward`."""
        start = 0 if cache is None else cache.length
        _check_tokens(tokens, start, self.config.context)
        x, rotary = self._embed(tokens, start)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        branch: Any = None
        for layer_idx, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[layer_idx]
            x, branch = block(x, branch=branch, return_branch=True, rotary=rotary, cache=layer)
        if self.norm is None:
            return x
        dropout_p = self.config.dropout if self.training else 0.0
        narrow = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        return fused_add_norm(self.norm, branch, x, dropout_p, out_dtype=narrow)[0]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets``, the tokens that follow ``tokens``.

        Args:
            tokens, targets: [B, T] integers; a target of -100 counts for nothing.
        Returns:
            A scalar, fp32 also for 16-bit logits.
        Raises:
            ValueError: The shapes differ. TypeError: not integers.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens, {list(tokens.shape)}, "
                f"got {list(targets.shape)}"
            )
        if targets.dtype not in INTEGER_DTYPES:
            raise TypeError(f"targets must be integers, got {targets.dtype}")
        x = self.features(tokens)
        if self.head is not None and not is_plain_linear(self.head):
            return cross_entropy(self.head(x), targets)
        weight = self.tokens.weight if self.head is None else self.head.weight
        return linear_cross_entropy(x, weight, targets)

    def new_cache(self) -> KVCache:
        """An empty cache for :meth:`forward`."""
        return KVCache(self.config.num_layers, self.config.context)

    def num_parameters(self) -> int:
        """Elements of all parameters; those of a tied head once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _embed(self, tokens: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(embeddings [B, T, C], rotary tables or None) of tokens from position ``start`` on."""
        try:
            x = self.tokens(tokens if tokens.dtype in (torch.int32, torch.int64) else tokens.long())
        except IndexError:
            raise ValueError(f"tokens must be in 0 .. {self.config.vocab_size - 1}") from None
        T = tokens.shape[1]
        if self.positions is not None:
            return x + self.positions.weight[start : start + T], None
        positions = torch.arange(start, start + T, device=tokens.device)
        if self.config.positions == "sinusoidal":
            table = sinusoidal_table(positions, self.config.embed_dim, dtype=x.dtype)
            return x * math.sqrt(self.config.embed_dim) + table, None
        table_dtype = torch.promote_types(x.dtype, torch.float32)
        return x, rotary_tables(positions, self.config.head_dim, dtype=table_dtype)


def _make_block(config: GPTConfig, place: dict[str, Any]) -> GPTBlock:
    return GPTBlock(
        config.embed_dim,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        ffn_dim=config.ffn_dim,
        activation=config.activation,
        norm=config.norm,
        norm_first=config.norm_first,
        dropout=config.dropout,
        bias=config.bias,
        **place,
    )


def _check_tokens(tokens: Tensor, start: int, context: int) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [B, T], got shape {list(tokens.shape)}")
    if tokens.dtype not in INTEGER_DTYPES:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if start + tokens.shape[1] > context:
        cached = f" after {start} cached ones" if start else ""
        raise ValueError(f"the context is {context} tokens, got {tokens.shape[1]}{cached}")
