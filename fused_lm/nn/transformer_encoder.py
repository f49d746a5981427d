"""torch's TransformerEncoder around our layers.

Boolean masks stay boolean: stock makes float ones of them, and two float masks can only be added.

In inference stock makes a NestedTensor of a batch without its padded tokens. Under ``auto`` it
still does, because nobody has measured our kernels against that; a forced backend computes the
padded tokens too. What leaving them out means stays: they leave an encoder as zeros exactly where
stock would have dropped them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import transformer as stock_transformer

from fused_lm import dispatch
from fused_lm.nn.dropin import TYPICAL_TOKENS, DropIn, stays_stock
from fused_lm.nn.stock_paths import encoder_drops_padding
from fused_lm.nn.transformer_layers import TransformerEncoderLayer, torch_refuses


class TransformerEncoder(DropIn, nn.TransformerEncoder):
    """Drop-in for ``torch.nn.TransformerEncoder``: hands boolean masks on as they are, and where
    kernels run, padded tokens with them.
    """

    stock: ClassVar[type[nn.Module]] = nn.TransformerEncoder
    kind: ClassVar[str] = "attention"

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`, of its first layer's attention."""
        attention = getattr(self.layers[0], "self_attn", None)
        return attention.likely_backend(tokens) if isinstance(attention, DropIn) else "pytorch"

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Arguments, shapes and meaning of torch's ``TransformerEncoder.forward``."""
        padding = src_key_padding_mask
        # Layers of others may count on the float masks that stock hands them.
        forward = TransformerEncoderLayer.forward
        ours = all(type(layer).forward is forward for layer in self.layers)
        stock = stays_stock(src) or src.is_nested or torch_refuses(mask, padding) or not ours
        dropped = None if stock else self._dropped_rows(src, mask, padding)
        if stock or (dropped is not None and dispatch.current_backend() == "auto"):
            return super().forward(src, mask, padding, is_causal)
        first: Any = self.layers[0]
        rows = stock_transformer._get_seq_len(src, first.self_attn.batch_first)
        causal = is_causal is True
        if is_causal is None and mask is not None:  # stock compares float masks
            floats = F._canonical_mask(mask, "mask", None, "", src.dtype, check_other=False)
            causal = stock_transformer._detect_is_causal_mask(floats, None, rows)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        if dropped is not None:
            output = output.masked_fill(dropped.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _dropped_rows(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """bool [N, T]: the tokens that stock would leave out of a NestedTensor, which makes zeros
        of them. None: it makes no NestedTensor.

        With ``mask_check=False`` the padding is on the right because the user says so.
        """
        if padding is None or not encoder_drops_padding(self, src, mask, padding):
            return None
        hidden = padding != 0
        # Only padding on the right is dropped: no key after a padded one.
        checks = getattr(self, "mask_check", True)
        return hidden & ~(hidden[:, :-1] & ~hidden[:, 1:]).any() if checks else hidden
