"""Attention for the models of Hugging Face's transformers (4.57 and later), under the name
``fused_lm``.

:func:`register` enters two functions: the attention, and the masks of its models. Without the
second one transformers hands over no mask at all, and a padded batch is wrong without a word.

Masks are those of transformers' ``sdpa``: None where causality (or nothing) is all that hides, else
bool [B, 1, T, S]. Where such a mask is padding alone, or padding and causality, the two are also
noted on it, as ``key_mask`` [B, S] and ``causal``; a kernel then skips what causality hides and
reads S elements a sequence instead of T x S. A mask that was copied or changed since has no valid
note and is read itself. Versions that don't say where the queries start (4.57, the first 5s) have
no notes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fused_lm.nn.dropin import kernel_runs
from fused_lm.ops.attention import attention, attention_weights
from fused_lm.ops.registration import make_rng

NAME = "fused_lm"
NOTE = "_fused_lm_note"
MISSING = 'fused_lm needs transformers for this: pip install "transformers>=4.57"'

REFUSED = {
    "head_mask": "a mask of heads",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "block_indices": "sparse attention by blocks",
}
"""Keyword arguments of attention functions that would change the result, and what they ask for."""

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' name of an activation -> ours."""


class MaskNote(NamedTuple):
    """What a [B, 1, T, S] mask says in fewer elements, as :func:`fused_lm.attention` takes it, and
    the version of the mask that it was said of.
    """

    key_mask: Tensor | None
    causal: bool | str
    version: int


def register() -> None:
    """Makes ``attn_implementation="fused_lm"`` known to transformers; again is harmless.

    >>> fused_lm.integrations.huggingface.register()
    >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fused_lm")

    Raises:
        ModuleNotFoundError: transformers is missing or older than 4.57.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ModuleNotFoundError(MISSING) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function on :func:`fused_lm.attention`.

    Args:
        module: The attention module; says whether it trains and, without ``is_causal``, whether it
            is causal.
        query: [B, H, T, D]. key, value: [B, Hkv, S, D], Hkv a divisor of H.
        attention_mask: Broadcastable to [B, H, T, S] once cut to S keys: bool, True = attend, or
            float, added. Where it is given, it alone says what is hidden. The lowest number of its
            dtype hides a key as -inf does.
        scaling, softcap: As ``scale`` and ``softcap`` of :func:`fused_lm.attention`.
        dropout: Probability of dropping a weight, in training.
        is_causal: As in transformers' ``sdpa``: query t sees keys up to t, if there is no mask and
            more than one query.
        position_bias: [B or 1, H, T, S], added to the scores.
        sliding_window: Without a mask: a query sees that many keys, itself and those before it,
            and as many after it if it isn't causal. A mask has the window in it already.
        kwargs: ``output_attentions`` asks for the weights; what would change the result raises.
    Returns:
        ([B, T, H, D] contiguous, weights [B, H, T, S] or None). Rows without a visible key are 0.
    Raises:
        ValueError: A keyword argument that asks for something else than softmax attention.
    """
    _check_kwargs(attention_mask, kwargs)
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "dropout_p": dropout if module.training else 0.0,
    }
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # The length first: in a graph with symbolic sizes the result must be a plain bool.
        options["causal"] = "top_left" if query.shape[2] > 1 and causal else False
        options["window"] = _window(key.shape[2], sliding_window, bool(causal))
        options["bias"] = position_bias
    else:
        options.update(_masks(query, key, value, attention_mask, position_bias, options))
    if not kwargs.get("output_attentions"):
        out: Any = attention(query, key, value, **options)
        return out.transpose(1, 2).contiguous(), None
    if options["dropout_p"]:
        options["rng"] = make_rng(query.device)
    out, lse = attention(query, key, value, return_lse=True, **options)
    weights = attention_weights(query, key, lse, average_heads=False, **options)
    return out.transpose(1, 2).contiguous(), weights


def _check_kwargs(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"fused_lm's attention has no {name} ({what}): use 'eager'")
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and attention_mask is None and lengths.shape[0] > 2:
        raise ValueError(
            "fused_lm's attention needs position_ids to tell packed sequences apart, "
            "it doesn't read cu_seq_lens_q"
        )


def _window(
    keys: int, sliding_window: int | None, causal: bool
) -> tuple[int | None, int | None] | None:
    """As :func:`fused_lm.attention` takes it; None where it hides nothing of that many keys."""
    if sliding_window is None or keys <= sliding_window:
        return None
    return sliding_window - 1, 0 if causal else sliding_window - 1


def _masks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of :func:`fused_lm.attention` that say what transformers' masks say."""
    note: MaskNote | None = None if is_compiling() else getattr(attention_mask, NOTE, None)
    if note is not None and note.version == attention_mask._version:
        noted = {"key_mask": note.key_mask, "causal": note.causal, "bias": position_bias}
        # PyTorch would have to build the mask again that is here already.
        if kernel_runs("attention", query, key, value, **noted, **options):
            return noted
    # Static caches have masks for more keys than 4.57 hands over.
    mask = attention_mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return {"mask": mask, "bias": position_bias}
    shown = mask > torch.finfo(mask.dtype).min
    return {"mask": shown, "bias": mask if position_bias is None else mask + position_bias}


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' ``sdpa`` mask, with a :class:`MaskNote` where one is true; takes what the
    installed version gives to its mask functions.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    if mask is None or is_compiling() or mask.is_inference():
        return mask
    note = _note(mask, kwargs)
    if note is not None:
        setattr(mask, NOTE, note)
    return mask


def _note(mask: Tensor, kwargs: dict[str, Any]) -> MaskNote | None:
    """What ``mask`` consists of, if that is padding and causality at most."""
    from transformers import masking_utils

    start: Any = kwargs.get("q_offset")
    T, S = kwargs.get("q_length", 0), kwargs.get("kv_length", 0)
    if type(start) is not int or kwargs.get("kv_offset", 0) != 0 or start + T != S:
        return None
    pattern = kwargs.get("mask_function")
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    if pattern is None or pattern not in (masking_utils.causal_mask_function, bidirectional):
        return None
    padding = kwargs.get("attention_mask")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (len(mask), S)):
        return None
    causal = False if pattern is bidirectional else "bottom_right"
    return MaskNote(padding, causal, mask._version)
