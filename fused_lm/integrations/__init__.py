"""Other people's models on our operators: one call for a model, torch's attention, Hugging Face."""

from fused_lm.integrations import huggingface  # imports transformers at its first use only

__all__ = ["huggingface"]
