"""The language model: GPT, its configuration, its key/value cache, and sampling."""

from fused_lm.lm.cache import KVCache, LayerCache
from fused_lm.lm.generate import generate
from fused_lm.lm.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "KVCache", "LayerCache", "generate"]
