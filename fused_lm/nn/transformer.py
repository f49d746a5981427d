"""The block of a GPT: causal self-attention and a feed-forward network around a residual stream.

pre-norm:   s = x + drop(attn(norm1(x)));  y = s + drop(ffn(norm2(s)))
post-norm:  s = norm1(x + drop(attn(x)));  y = norm2(s + drop(ffn(s)))

``norm(x + drop(branch))`` is one operator (``layer_norm(branch, residual=x)``), which for pre-norm
also returns the stream s. The last add of a pre-norm block belongs to the norm of the next one: a
stack of blocks hands it on (``return_branch``), a block alone adds it plainly.

What a pre-norm block keeps for its backward with the kernels, in units of C a token (GELU, 4C
wide): the stream once per norm, q, k, v, the attention's output and the pre-activation of the
feed-forward network: 2 * 1 + 3 + 1 + 4 = 10. Stock modules keep 17: both norms' outputs, the
activation and two dropout masks too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lm.nn.dropin import is_plain_linear
from fused_lm.nn.feedforward import FeedForward
from fused_lm.nn.norm import LayerNorm, RMSNorm, eps_of, fused_add_norm, make_norm, norm_of
from fused_lm.ops.attention import attention
from fused_lm.ops.linear_act import linear_act
from fused_lm.ops.norm_input import NormInput
from fused_lm.ops.registration import autocast_dtype
from fused_lm.ops.rotary import rotary_qk

if TYPE_CHECKING:
    from fused_lm.lm.cache import LayerCache

NORMS = ("layer_norm", "rms_norm")


class GPTBlock(nn.Module):
    """One causal transformer block, [B, T, C] -> [B, T, C].

    Args:
        embed_dim: C.
        num_heads: H query heads.
        num_kv_heads: Heads of keys and values, a divisor of H (grouped or multi-query attention).
            Default H.
        head_dim: D. Default C / H.
        ffn_dim, activation: See :class:`FeedForward`.
        norm: "layer_norm" or "rms_norm".
        norm_first: Pre-norm (GPT-2 and later) or post-norm (Vaswani et al. 2017).
        dropout: Probability of dropping an element of either branch, in training.
        attention_dropout: Probability of dropping an attention weight, in training. Default:
            ``dropout``.
        bias: Whether linears and LayerNorms have a bias.
        eps: Of both norms.
        window: (left, right) or None: each token sees at most ``left`` tokens before itself. A
            causal block sees none after itself, whatever ``right``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 leaves them.
        recompute: Keep neither the norms' outputs nor the activation for the backward, but make
            them again, in elementwise passes; without effect where PyTorch's operators run.
    Raises:
        ValueError: Sizes that don't divide, unknown names, probabilities outside [0, 1].
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        norm: str = "layer_norm",
        norm_first: bool = True,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        bias: bool = True,
        eps: float = 1e-5,
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = _checked_head_dim(embed_dim, num_heads, self.num_kv_heads, head_dim)
        self.norm_first = norm_first
        self.dropout = dropout
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.window, self.softcap, self.recompute = window, softcap, recompute
        _check_choices(norm, self.dropout, self.attention_dropout, eps, window, softcap)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        qkv_heads = num_heads + 2 * self.num_kv_heads
        self.norm1 = make_norm(norm, embed_dim, eps, bias, **place)
        self.qkv = nn.Linear(embed_dim, qkv_heads * self.head_dim, bias=bias, **place)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias, **place)
        self.norm2 = make_norm(norm, embed_dim, eps, bias, **place)
        self.ffn = FeedForward(
            embed_dim, ffn_dim, activation=activation, bias=bias, recompute=recompute, **place
        )

    def forward(
        self,
        x: Tensor,
        *,
        branch: Tensor | None = None,
        return_branch: bool = False,
        key_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs the block.

        Args:
            x: [B, T, C].
            branch: [B, T, C] that the block before this one has not added to its ``x``.
            return_branch: Leave the last add to whoever comes next, with the dropout before it.
            key_mask: [B, S] bool, True = attend; S counts the cached tokens too. A token that sees
                no key at all gets zeros from the attention.
            rotary: (cos, sin), each [T, D/2], of the positions of x (see ``nn.positions``).
            cache: Keys and values of the tokens before x, to which those of x are appended.
        Returns:
            [B, T, C]; with ``return_branch`` (x, branch), where a post-norm block has no branch.
        """
        dropout_p = self.dropout if self.training else 0.0
        if not self.norm_first:
            x = x if branch is None else x + _dropped(branch, dropout_p)
            attended = self._attend(x, None, key_mask, rotary, cache)
            x, stream = fused_add_norm(self.norm1, attended, x, dropout_p)
            branch = self._feed_forward(x, self._source(self.norm1, x, stream))
            x, _ = fused_add_norm(self.norm2, branch, x, dropout_p)
            return (x, None) if return_branch else x
        hidden, stream = self._normed(self.norm1, branch, x, dropout_p)
        source = self._source(self.norm1, hidden, stream)
        attended = self._attend(hidden, source, key_mask, rotary, cache)
        hidden, stream = self._normed(self.norm2, attended, stream, dropout_p)
        branch = self._feed_forward(hidden, self._source(self.norm2, hidden, stream))
        return (stream, branch) if return_branch else stream + _dropped(branch, dropout_p)

    def _normed(
        self, norm: LayerNorm | RMSNorm, branch: Tensor | None, x: Tensor, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of s = x + drop(branch). Autocast narrows norm(s) for the linear that reads
        it, so that nothing wider is written.
        """
        narrow = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        if branch is None:
            return norm_of(norm, x, out_dtype=narrow), x
        return fused_add_norm(norm, branch, x, dropout_p, out_dtype=narrow)

    def _source(
        self, norm: LayerNorm | RMSNorm, hidden: Tensor, stream: Tensor
    ) -> NormInput | None:
        """What the linear behind a norm needs to run it again."""
        if not self.recompute:
            return None
        rms = isinstance(norm, RMSNorm)
        bias = None if isinstance(norm, RMSNorm) else norm.bias
        return NormInput(hidden, stream, norm.weight, bias, eps_of(norm, stream.dtype), rms)

    def _feed_forward(self, x: Tensor, x_norm: NormInput | None) -> Tensor:
        """Whatever ``ffn`` is now; only our own knows what to do with ``x_norm``."""
        return self.ffn(x, x_norm=x_norm) if type(self.ffn) is FeedForward else self.ffn(x)

    def _attend(
        self,
        x: Tensor,
        x_norm: NormInput | None,
        key_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Causal self-attention and its output projection, [B, T, C] -> [B, T, C]."""
        B, T, _ = x.shape
        H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        # Split before the transpose: the gradients are then concatenated as the linear wants them.
        if is_plain_linear(self.qkv):
            qkv = linear_act(x, self.qkv.weight, self.qkv.bias, activation="none", x_norm=x_norm)
        else:
            qkv = self.qkv(x)
        heads = qkv.view(B, T, H + 2 * Hkv, D).split((H, Hkv, Hkv), dim=2)
        q, k, v = (part.transpose(1, 2) for part in heads)
        if rotary is not None:
            q, k = rotary_qk(q, k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        out: Any = attention(
            q,
            k,
            v,
            key_mask=key_mask,
            causal="top_left" if cache is None else "bottom_right",
            window=self.window,
            softcap=self.softcap,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).reshape(B, T, H * D))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, norm_first={self.norm_first}, dropout={self.dropout}, "
            f"attention_dropout={self.attention_dropout}, window={self.window}, "
            f"softcap={self.softcap}"
        )


def _dropped(branch: Tensor, dropout_p: float) -> Tensor:
    return F.dropout(branch, dropout_p) if dropout_p else branch


def _checked_head_dim(
    embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None
) -> int:
    """Checks the sizes of the attention and returns D."""
    if embed_dim < 1 or num_heads < 1 or num_kv_heads < 1:
        sizes = f"{embed_dim}, {num_heads} and {num_kv_heads}"
        raise ValueError(f"embed_dim, num_heads and num_kv_heads must be at least 1, got {sizes}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must divide embed_dim ({embed_dim}) or head_dim be given"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return embed_dim // num_heads if head_dim is None else head_dim


def _check_choices(
    norm: str,
    dropout: float,
    attention_dropout: float,
    eps: float,
    window: tuple[int | None, int | None] | None,
    softcap: float,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for name, value in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be within 0 and 1, got {value}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if not softcap >= 0.0:
        raise ValueError(f"softcap must not be negative (0 is none), got {softcap}")
    if window is None:
        return
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(w is not None and w < 0 for w in window)
    ):
        raise ValueError(
            f"window must be None or (left, right), each None or at least 0, got {window!r}"
        )
