"""The attention of transformers' models set to ours, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from fused_lm.integrations.huggingface import NAME, register
from fused_lm.nn.dropin import TYPICAL_TOKENS, backend_of, stand_in

BEFORE = "_fused_lm_attention_before"
"""Attribute of a model that was switched: the attention of its configuration and of those in it."""


class AttentionSwitch(NamedTuple):
    """What :func:`use_fused_attention` did: the names of the models that it switched, by path, and
    a sentence for each that it left, by path.
    """

    changed: dict[str, str]
    left: dict[str, str]


def use_fused_attention(model: nn.Module) -> AttentionSwitch:
    """Sets the attention of every transformers model that is, or is in, ``model`` to ``fused_lm``.

    Each remembers what it had, for :func:`leave_fused_attention`. Models whose attention can't be
    set, or for which transformers has no ``sdpa``, keep theirs.

    Raises:
        ModuleNotFoundError: transformers is missing or older than 4.57.
    """
    register()
    from transformers import PreTrainedModel

    models = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    before = {path: _implementations(m) for path, m in models.items()}
    changed, left = {}, {}
    for path, module in models.items():
        reason = _why_not(module)
        if reason is not None:
            left[path] = reason
        elif module.config._attn_implementation != NAME:
            changed[path] = str(before[path][0])
            module.set_attn_implementation(NAME)
    for path in left:  # setting a model sets those inside of it too
        _set_implementations(models[path], before[path])
    for path, module in models.items():
        if path not in left and any(name != NAME for name in before[path]):
            # A choice that was made since an earlier switch is what to go back to.
            noted = module.__dict__.get(BEFORE, before[path])
            pairs = zip(before[path], noted, strict=True)
            module.__dict__[BEFORE] = [old if now == NAME else now for now, old in pairs]
            changed.setdefault(path, str(before[path][0]))
    return AttentionSwitch(changed, left)


def leave_fused_attention(modules: Iterable[nn.Module]) -> int:
    """Sets what was set before :func:`use_fused_attention`, but for what was set to something else
    since.

    Returns:
        How many of ``modules`` were switched back.
    """
    marked = [module for module in modules if BEFORE in module.__dict__]
    for module in marked:
        names = module.__dict__.pop(BEFORE)
        now = _implementations(module)
        kept = (old if name == NAME else name for name, old in zip(now, names, strict=True))
        _set_implementations(module, list(kept))
    return len(marked)


def _implementations(model: Any) -> list[str | None]:
    return [config._attn_implementation for config in _configs(model.config)]


def _set_implementations(model: Any, names: list[str | None]) -> None:
    for config, name in zip(_configs(model.config), names, strict=True):
        config._attn_implementation_internal = name


def _configs(config: Any) -> list[Any]:
    """A configuration and those in it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(c for sub in inner if sub is not None for c in _configs(sub))]


def _why_not(model: Any) -> str | None:
    """Why a model of transformers can't have our attention, None if it can."""
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        return f"{name} has its attention written out, no other can be set."
    # A softcap is what sdpa lacks and fused_lm has; others without sdpa have no plain softmax.
    if not model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None):
        return f"{name} has attention that transformers offers no sdpa for."
    if model.config.output_attentions:
        return f"The configuration of {name} asks for attention weights, which takes 'eager'."
    return None


def likely_backend(model: Any) -> str:
    """The backend that the attention of a model of transformers would run on now, for a sequence of
    a usual length without padding; empty if its configuration doesn't say how wide the heads are.
    """
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if heads is None or parameter is None or not getattr(config, "hidden_size", None):
        return ""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    q, k = (
        stand_in((1, count, TYPICAL_TOKENS, head_dim), parameter) for count in (heads, kv_heads)
    )
    return backend_of("attention", q, k, k)
