"""Keys and values of the tokens a model has read, so that the next token costs O(T), not O(T^2)."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer: buffers [B, Hkv, context, D], filled for ``length`` tokens.

    The buffers are allocated once, by the first :meth:`append`, with the batch, heads, dtype and
    device of its keys (under autocast these are not the weights').
    """

    def __init__(self, context: int) -> None:
        self.context = context
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens and returns all cached ones.

        Args:
            k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv].
        Returns:
            Views [B, Hkv, length, D] and [B, Hkv, length, Dv] of the buffers, whose values stay
            until :meth:`reset`.
        Raises:
            ValueError: More tokens than the context has room for, or, after the first call, keys or
                values of another batch, head shape, dtype or device.
            RuntimeError: The tensors require gradients, which a cache can't carry.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "a key/value cache carries no gradients: call the model under torch.no_grad()"
            )
        if self.length == 0 and not (_fits(self._keys, k) and _fits(self._values, v)):
            self._keys, self._values = self._buffer(k), self._buffer(v)
        keys, values = self._keys, self._values
        if keys is None or values is None or not (_fits(keys, k) and _fits(values, v)):
            got, begun = list(k.shape), None if keys is None else list(keys.shape)
            raise ValueError(
                f"the cache was begun with keys [B, Hkv, context, D] = {begun}, got {got}"
            )
        new_length = self.length + k.shape[2]
        if new_length > self.context:
            raise ValueError(
                f"the cache holds {self.length} of {self.context} tokens, "
                f"no room for {k.shape[2]} more"
            )
        keys[:, :, self.length : new_length] = k
        values[:, :, self.length : new_length] = v
        self.length = new_length
        return keys[:, :, :new_length], values[:, :, :new_length]

    def reset(self) -> None:
        """Forgets all tokens; the buffers are kept for as long as the shapes stay."""
        self.length = 0

    def _buffer(self, like: Tensor) -> Tensor:
        B, Hkv, _, D = like.shape
        return like.new_empty(B, Hkv, self.context, D)


class KVCache:
    """One :class:`LayerCache` per layer of a model.

    Memory: ``num_layers * 2 * B * Hkv * context * D`` elements, from the first use on.
    """

    def __init__(self, num_layers: int, context: int) -> None:
        self.layers = [LayerCache(context) for _ in range(num_layers)]
        self.context = context

    @property
    def length(self) -> int:
        """Tokens cached so far."""
        return self.layers[0].length if self.layers else 0

    def reset(self) -> None:
        """Forgets all tokens; the buffers are kept."""
        for layer in self.layers:
            layer.reset()


def _fits(buffer: Tensor | None, new: Tensor) -> bool:
    if buffer is None or buffer.dtype != new.dtype or buffer.device != new.device:
        return False
    return buffer.shape[:2] == new.shape[:2] and buffer.shape[3] == new.shape[3]
