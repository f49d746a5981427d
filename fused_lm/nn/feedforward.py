"""The position-wise network of a transformer block: up, activation, down, or the gated kind.

plain:  ``down(act(up(x)))``                      up [F, C], down [C, F]
gated:  ``down(act(gate) * value)``               up [2F, C], its first F rows make the gate

Both are one operator, :func:`fused_lm.ffn`. Sources: see ``fused_lm.reference.activations``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lm.nn.dropin import is_plain_linear
from fused_lm.ops.ffn import ffn
from fused_lm.ops.norm_input import NormInput
from fused_lm.reference.activations import ACTIVATIONS, GATES, activate

GATED_WIDTH_MULTIPLE = 64


def default_ffn_dim(embed_dim: int, activation: str) -> int:
    """F when none is given: 4C, or for a gated one 8C/3 (as many weights) rounded up to 64s."""
    if activation not in GATES:
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
        ffn_dim: F. Default 4C, for a gated activation 8C/3 rounded up to a multiple of 64.
        activation: gelu | gelu_tanh | relu | relu_squared | silu | swiglu | geglu | geglu_tanh.
        bias: Whether both linears have a bias.
        dropout: Probability of dropping an element of the output, in training.
        recompute: Make the activation again in the backward instead of keeping it, which the
            kernels do without a product more (see :func:`fused_lm.ffn`).
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
        recompute: bool = True,
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
        self.recompute = recompute
        up_dim = 2 * self.ffn_dim if activation in GATES else self.ffn_dim
        self.up = nn.Linear(embed_dim, up_dim, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(self.ffn_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, x_norm: NormInput | None = None) -> Tensor:
        """x [..., C] -> [..., C]; ``x_norm`` as in :func:`fused_lm.ffn`."""
        if is_plain_linear(self.up) and is_plain_linear(self.down):
            out = ffn(
                x,
                self.up.weight,
                self.down.weight,
                up_bias=self.up.bias,
                down_bias=self.down.bias,
                activation=self.activation,
                recompute=self.recompute,
                x_norm=x_norm,
            )
        else:
            out = self.down(activate(self.up(x), self.activation))
        return F.dropout(out, self.dropout, self.training) if self.dropout else out

    def extra_repr(self) -> str:
        sizes = f"{self.embed_dim}, {self.ffn_dim}"
        return f"{sizes}, activation={self.activation}, dropout={self.dropout}"
