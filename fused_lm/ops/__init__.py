"""The operators: signature, docstring, checks, autograd, shape inference."""

from fused_lm.ops import schemas  # defines every schema before anything is registered on one

__all__ = ["schemas"]
