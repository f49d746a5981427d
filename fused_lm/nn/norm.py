"""LayerNorm and RMSNorm: torch's modules with the fused operators inside."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fused_lm.nn.dropin import TYPICAL_TOKENS, DropIn, backend_of, stand_in
from fused_lm.ops.layernorm import layer_norm, rms_norm


class LayerNorm(DropIn, nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm``: same constructor, parameters, ``state_dict``, errors.

    Several normalised dims are flattened into one. Under autocast it behaves as torch's (fp32 on
    CUDA).

    >>> norm = fused_lm.nn.LayerNorm(768)
    >>> y = norm(torch.randn(2, 16, 768))
    """

    stock: ClassVar[type[nn.Module]] = nn.LayerNorm
    kind: ClassVar[str] = "norm"

    def forward(self, input: Tensor) -> Tensor:
        """input [*, normalized_shape] -> the same shape; NestedTensors are left to torch."""
        if input.is_nested:
            return super().forward(input)
        if len(self.normalized_shape) == 1 and input.shape[-1:] == self.normalized_shape:
            if input.shape[-1] == 0:
                return super().forward(input)
            return cast(Tensor, layer_norm(input, self.weight, self.bias, eps=self.eps))
        if not _ends_with(input, self.normalized_shape) or math.prod(self.normalized_shape) == 0:
            return super().forward(input)  # torch's own error text
        rows = input.flatten(-len(self.normalized_shape))
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        y = cast(Tensor, layer_norm(rows, weight, bias, eps=self.eps))
        return y.view(input.shape)

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        return _likely_backend("layer_norm", self, tokens)


class RMSNorm(DropIn, nn.RMSNorm):
    """Drop-in for ``torch.nn.RMSNorm``: same constructor, parameters, ``state_dict``, errors.

    >>> norm = fused_lm.nn.RMSNorm(768)
    >>> y = norm(torch.randn(2, 16, 768))
    """

    stock: ClassVar[type[nn.Module]] = nn.RMSNorm
    kind: ClassVar[str] = "norm"

    def forward(self, x: Tensor) -> Tensor:
        """x [*, normalized_shape] -> the same shape; NestedTensors are left to torch."""
        if (
            x.is_nested
            or not _ends_with(x, self.normalized_shape)
            or math.prod(self.normalized_shape) == 0
        ):
            return super().forward(x)  # where it is wrong, torch's own error text
        rows = x.flatten(-len(self.normalized_shape))
        weight = None if self.weight is None else self.weight.flatten()
        return cast(Tensor, rms_norm(rows, weight, eps=self.eps)).view(x.shape)

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        return _likely_backend("rms_norm", self, tokens)


def _likely_backend(op: str, norm: LayerNorm | RMSNorm, tokens: int) -> str:
    weight = norm.weight  # None: nothing says where the module would run
    like = torch.empty(0) if weight is None else weight
    width = math.prod(norm.normalized_shape)
    if width == 0:
        return "pytorch"
    rows = stand_in((tokens, width), like)
    return backend_of(op, rows, None if weight is None else weight.flatten())


def _ends_with(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.dim() >= len(shape) > 0 and x.shape[-len(shape) :] == torch.Size(shape)
