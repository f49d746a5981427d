"""fused_lm: fused attention and norms for training language models, as torch operators and
modules.
"""

from fused_lm import integrations, nn
from fused_lm.dispatch import use_backend
from fused_lm.explain import why
from fused_lm.integrations.fuse import FuseReport, fuse, fused, unfuse
from fused_lm.integrations.sdpa import activate_sdpa, deactivate_sdpa, sdpa_activated
from fused_lm.ops.attention import attention, attention_weights
from fused_lm.ops.attention_decode import attention_decode
from fused_lm.ops.attention_varlen import attention_varlen
from fused_lm.ops.cross_entropy import cross_entropy
from fused_lm.ops.ffn import ffn
from fused_lm.ops.layernorm import layer_norm, rms_norm
from fused_lm.ops.linear_act import linear_act
from fused_lm.ops.linear_cross_entropy import linear_cross_entropy
from fused_lm.ops.linear_residual import linear_residual
from fused_lm.ops.norm_input import NormInput
from fused_lm.ops.registration import make_rng
from fused_lm.ops.rotary import rotary, rotary_qk
from fused_lm.ops.sdpa import scaled_dot_product_attention
from fused_lm.version import __version__

__all__ = [
    "FuseReport",
    "NormInput",
    "__version__",
    "activate_sdpa",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "deactivate_sdpa",
    "ffn",
    "fuse",
    "fused",
    "integrations",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "linear_residual",
    "make_rng",
    "nn",
    "rms_norm",
    "rotary",
    "rotary_qk",
    "scaled_dot_product_attention",
    "sdpa_activated",
    "unfuse",
    "use_backend",
    "why",
]
