"""Modules: drop-ins for torch's, and the blocks a GPT is built of."""

from fused_lm.nn.attention import MultiheadAttention
from fused_lm.nn.feedforward import FeedForward
from fused_lm.nn.norm import LayerNorm, RMSNorm
from fused_lm.nn.transformer import GPTBlock
from fused_lm.nn.transformer_encoder import TransformerEncoder
from fused_lm.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "GPTBlock",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
