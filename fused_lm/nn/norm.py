"""LayerNorm and RMSNorm: torch's modules with the fused operators inside."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fused_lm.nn.dropin import TYPICAL_TOKENS, DropIn, backend_of, stand_in
from fused_lm.ops.layernorm import default_eps, layer_norm, rms_norm


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


def make_norm(
    norm: str,
    embed_dim: int,
    eps: float,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LayerNorm | RMSNorm:
    """The norm module of that name; RMSNorm has no bias to leave out."""
    if norm == "rms_norm":
        return RMSNorm(embed_dim, eps=eps, device=device, dtype=dtype)
    return LayerNorm(embed_dim, eps=eps, bias=bias, device=device, dtype=dtype)


def fused_add_norm(
    norm: LayerNorm | RMSNorm,
    branch: Tensor,
    residual: Tensor,
    dropout_p: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = residual + dropout(branch)``; returns (norm(s), s), [..., C] each.

    Both have the dtype that torch's add gives them: under autocast the branch is 16-bit and the
    stream fp32. ``out_dtype`` narrows norm(s).
    """
    wide = torch.promote_types(branch.dtype, residual.dtype)
    result: Any = norm_of(
        norm,
        branch,
        residual=residual,
        dropout_p=dropout_p,
        return_residual=True,
        out_dtype=wide if out_dtype is None else out_dtype,
    )
    return result


def norm_of(norm: LayerNorm | RMSNorm, x: Tensor, **options: Any) -> Any:
    """:func:`fused_lm.layer_norm` or :func:`fused_lm.rms_norm`, with the parameters of a module."""
    residual = options.get("residual")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    eps = eps_of(norm, dtype)
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight, eps=eps, **options)
    return layer_norm(x, norm.weight, norm.bias, eps=eps, **options)


def eps_of(norm: LayerNorm | RMSNorm, dtype: torch.dtype) -> float:
    """The eps of a norm of a stream of this dtype; RMSNorm's default depends on it."""
    return default_eps(dtype) if norm.eps is None else norm.eps


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
