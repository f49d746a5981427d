"""Sampling from a model, one token at a time, at O(T) a token by its key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fused_lm.lm.gpt import GPT, INTEGER_DTYPES


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Continues each row of ``tokens`` by ``max_new_tokens`` sampled ones.

    The model reads at most its context: a longer prompt loses its beginning. When the context is
    full, the cache is emptied and filled again with the last half context, so that from then on a
    token sees between a half and a whole context, and a refill is paid once per half context.

    Args:
        model: Runs in eval mode; the mode of every submodule is restored afterwards.
        tokens: [B, T0] integers, T0 >= 1.
        max_new_tokens: n >= 0.
        temperature: Divides the logits; 0 takes the likeliest token and needs no generator.
        top_k, top_p: Which tokens are sampled from, see :func:`probabilities`.
        generator: Of the model's device. Default: torch's global one.
        stop: Given each new column of tokens, [B, 1]; True ends the text after it.
    Returns:
        [B, T0 + n], dtype of tokens; fewer than n new ones after a stop.
    Raises:
        ValueError, TypeError: An argument is impossible.
    """
    _check_arguments(tokens, max_new_tokens, temperature, top_k, top_p)
    context = model.config.context
    cache = model.new_cache()
    unread = tokens[:, -context:]
    pieces = [tokens]
    with _eval_mode(model):
        for _ in range(max_new_tokens):
            if cache.length + unread.shape[1] > context:
                cache.reset()
                unread = torch.cat(pieces, dim=1)[:, -max(1, context // 2) :]
            logits = model(unread, cache=cache)[:, -1]
            unread = _pick(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
            pieces.append(unread)
            if stop is not None and stop(unread):
                break
    return torch.cat(pieces, dim=1)


def probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities from which the next token is drawn.

    Args:
        logits: [B, V].
        temperature: Above 0; divides the logits.
        top_k: Keeps the k likeliest tokens; of equally likely ones, those of lower number.
        top_p: Of these, keeps the smallest set that together has at least this probability.
    Returns:
        [B, V] fp64, 0 outside of what is kept; each row sums to 1.
    """
    wide = logits.double()
    # Only differences matter; without the largest, a tiny temperature can't overflow.
    scaled = (wide - wide.amax(dim=-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return scaled.softmax(dim=-1)
    descending, order = scaled.sort(dim=-1, descending=True, stable=True)
    descending[..., top_k if top_k is not None else descending.shape[-1] :] = float("-inf")
    kept = descending.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        # A token stays if those before it have less than top_p together: the first always does.
        kept = kept.masked_fill(kept.cumsum(dim=-1) - kept >= top_p, 0.0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """logits [B, V] -> tokens [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    drawn_from = probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(drawn_from, 1, generator=generator)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_arguments(
    tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens must be [B, T] with at least one token, got shape {list(tokens.shape)}"
        )
    if tokens.dtype not in INTEGER_DTYPES:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 0
    ):
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
