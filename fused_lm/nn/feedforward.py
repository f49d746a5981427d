"""The position-wise network of a transformer block: up, activation, down, or the gated kind.

plain:  ``down(act(up(x)))``                      up [F, C], down [C, F]
gated:  ``down(act(gate) * value)``               up [2F, C], its first F rows make the gate

Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415) for gelu; So et al. 2021 (arXiv:2109.08668) for
relu_squared; Shazeer 2020 (arXiv:2002.05202) for the gated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED_WIDTH_MULTIPLE = 64


class Activation(NamedTuple):
    """``function`` is elementwise; ``gated`` multiplies its result by a second projection."""

    function: Callable[[Tensor], Tensor]
    gated: bool


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, gated=False),
    "relu": Activation(F.relu, gated=False),
    "relu_squared": Activation(_relu_squared, gated=False),
    "silu": Activation(F.silu, gated=False),
    "swiglu": Activation(F.silu, gated=True),
    "geglu": Activation(F.gelu, gated=True),
}


def default_ffn_dim(embed_dim: int, activation: str) -> int:
    """F when none is given: 4C, or for a gated one 8C/3 (as many weights) rounded up to 64s."""
    if not ACTIVATIONS[activation].gated:
        return 4 * embed_dim
    multiples = -(-8 * embed_dim // (3 * GATED_WIDTH_MULTIPLE))
    return multiples * GATED_WIDTH_MULTIPLE


class FeedForward(nn.Module):
    """Two linears around an activation, [..., C] -> [..., C].

    Dropout stands where GPT-2 has it, after ``down``, and not after the activation as in
    ``nn.TransformerEncoderLayer``. :class:`GPTBlock` builds its FeedForward without dropout and
    drops the branch itself, where it is added to the residual stream.

    Args:
        embed_dim: C.
        ffn_dim: F. Default 4C, for ``swiglu`` and ``geglu`` 8C/3 rounded up to a multiple of 64.
        activation: gelu | gelu_tanh | relu | relu_squared | silu | swiglu | geglu.
        bias: Whether both linears have a bias.
        dropout: Probability of dropping an element of the output, in training.
    Raises:
        ValueError: A size below 1, an unknown activation, a probability outside [0, 1].
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if embed_dim < 1 or (ffn_dim is not None and ffn_dim < 1):
            raise ValueError(
                f"embed_dim and ffn_dim must be at least 1, got {embed_dim} and {ffn_dim}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be within 0 and 1, got {dropout}")
        self.embed_dim = embed_dim
        self.ffn_dim = default_ffn_dim(embed_dim, activation) if ffn_dim is None else ffn_dim
        self.activation = activation
        self.dropout = dropout
        up_dim = 2 * self.ffn_dim if ACTIVATIONS[activation].gated else self.ffn_dim
        self.up = nn.Linear(embed_dim, up_dim, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(self.ffn_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        function, gated = ACTIVATIONS[self.activation]
        hidden = self.up(x)
        if gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = function(gate) * value
        else:
            hidden = function(hidden)
        out = self.down(hidden)
        return F.dropout(out, self.dropout, self.training) if self.dropout else out

    def extra_repr(self) -> str:
        sizes = f"{self.embed_dim}, {self.ffn_dim}"
        return f"{sizes}, activation={self.activation}, dropout={self.dropout}"
