"""Norms and feed-forward networks of transformers' models on our operators, as drop-ins.

Each is a class of its own, of the same name as transformers' and beneath it, made of the stock
class and one of the forwards here; :data:`FAMILIES` says which does the work of which. A forward
leaves the work to the stock class where none of our kernels can run, and where somebody listens to
or replaced a module that it would bypass (hooks, adapters, quantised linears).

Importing this imports transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from fused_lm.integrations.huggingface import ACTIVATION_NAMES
from fused_lm.nn.dropin import (
    TYPICAL_TOKENS,
    DropIn,
    backend_of,
    is_plain_linear,
    is_untouched,
    offered,
    stand_in,
    stays_stock,
)
from fused_lm.nn.norm import LayerNorm
from fused_lm.ops.ffn import ffn
from fused_lm.ops.layernorm import layer_norm, rms_norm
from fused_lm.ops.linear_act import linear_act

ACTIVATIONS: dict[type[nn.Module], str] = {
    type(ACT2FN[name]): ours for name, ours in ACTIVATION_NAMES.items() if name in ACT2FN
}
"""Class of transformers' activation -> our name of it."""


def activation_of(module: Any) -> str | None:
    """Our name of an activation module; None if there is none, or it can't be bypassed."""
    known = isinstance(module, nn.Module) and is_untouched(module, *ACTIVATIONS)
    return ACTIVATIONS[type(module)] if known else None


class _FeedForward(DropIn):
    """``down(act(up(x)))``, weights as ``nn.Linear`` or as ``Conv1D`` keeps them."""

    kind = "ffn"
    UP = "fc1"
    DOWN = "fc2"
    ACTIVATION = "activation_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., C] -> [..., C]."""
        options = None if stays_stock(hidden_states) else self._operands()
        if options is None:
            return self.stock.forward(self, hidden_states)
        return self._dropped(ffn(hidden_states, **options))

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        options = self._operands()
        if options is None:
            return "pytorch"
        weight = options["up_weight"]
        width = weight.shape[0 if options["transposed"] else 1]
        return backend_of("ffn", stand_in((tokens, width), weight), **options)

    def _operands(self) -> dict[str, Any] | None:
        """The arguments of :func:`fused_lm.ffn` beside x; None if it can't do the work."""
        up, down = getattr(self, self.UP), getattr(self, self.DOWN)
        activation = activation_of(getattr(self, self.ACTIVATION))
        linear = type(up)
        plain = linear in (nn.Linear, Conv1D) and all(is_untouched(m, linear) for m in (up, down))
        if activation is None or not plain or not offered("ffn"):
            return None
        return {
            "up_weight": up.weight,
            "down_weight": down.weight,
            "up_bias": up.bias,
            "down_bias": down.bias,
            "activation": activation,
            "transposed": linear is Conv1D,
        }

    def _dropped(self, out: Tensor) -> Tensor:
        return out


class _GPT2FeedForward(_FeedForward):
    """GPT-2's: ``dropout(down(act(up(x))))``."""

    UP = "c_fc"
    DOWN = "c_proj"
    ACTIVATION = "act"
    dropout: nn.Module

    def _dropped(self, out: Tensor) -> Tensor:
        return self.dropout(out)


class _GatedFeedForward(DropIn):
    """``down(act(gate(x)) * up(x))``; three matrices, so the product isn't in one kernel."""

    kind = "ffn"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        activation = None if stays_stock(x) else self._activation()
        if activation is None:
            return self.stock.forward(self, x)
        gate = linear_act(x, self.gate_proj.weight, self.gate_proj.bias, activation=activation)
        return self.down_proj(gate * self.up_proj(x))

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """That of the gate; the other two products are torch's."""
        return _backend_of_linear(self.gate_proj, self._activation(), tokens)

    def _activation(self) -> str | None:
        return _activation_behind(self.gate_proj, self.act_fn)


def _activation_behind(linear: nn.Module, activation: Any) -> str | None:
    """Our name of an activation that can be one operator with the linear layer before it."""
    fusable = is_plain_linear(linear) and offered("linear_act")
    return activation_of(activation) if fusable else None


class _LinearActivation(DropIn):
    """``act(dense(x))``, BERT's first half of a feed-forward network."""

    kind = "ffn"
    dense: nn.Linear
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., C] -> [..., F]."""
        activation = None if stays_stock(hidden_states) else self._activation()
        if activation is None:
            return self.stock.forward(self, hidden_states)
        return linear_act(hidden_states, self.dense.weight, self.dense.bias, activation=activation)

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        return _backend_of_linear(self.dense, self._activation(), tokens)

    def _activation(self) -> str | None:
        return _activation_behind(self.dense, self.intermediate_act_fn)


class _AddNorm(DropIn):
    """``norm(dropout(dense(x)) + residual)``, BERT's end of either branch."""

    kind = "norm"
    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states [..., F], input_tensor [..., C] -> [..., C]."""
        if stays_stock(hidden_states) or not self._fusable():
            return self.stock.forward(self, hidden_states, input_tensor)
        branch = self.dense(hidden_states)
        if branch.shape != input_tensor.shape:
            return self.LayerNorm(self.dropout(branch) + input_tensor)
        norm = self.LayerNorm
        wide = torch.promote_types(branch.dtype, input_tensor.dtype)
        out: Any = layer_norm(
            branch,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            residual=input_tensor,
            dropout_p=self._dropout_p,
            # The operator's own default is that of torch's norm of a branch, autocast included.
            out_dtype=None if wide == branch.dtype else wide,
        )
        return out

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        norm = self.LayerNorm
        if not self._fusable() or norm.weight is None:
            return "pytorch"
        x = stand_in((tokens, norm.weight.shape[0]), norm.weight)
        options = {"eps": norm.eps, "residual": x, "dropout_p": self._dropout_p}
        return backend_of("layer_norm", x, norm.weight, norm.bias, **options)

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0

    def _fusable(self) -> bool:
        norm = self.LayerNorm
        return (
            is_untouched(self.dropout, nn.Dropout)
            and is_untouched(norm, nn.LayerNorm, LayerNorm)
            and len(norm.normalized_shape) == 1
        )


class _RootMeanSquareNorm(DropIn):
    """``weight * x / sqrt(mean(x^2) + eps)``, Llama's norm."""

    kind = "norm"
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., C] -> the same shape, in the dtype of its product with weight."""
        if stays_stock(hidden_states):
            return self.stock.forward(self, hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        eps = self.variance_epsilon
        out: Any = rms_norm(hidden_states, self.weight, eps=eps, out_dtype=dtype)
        return out

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """As :meth:`DropIn.likely_backend`."""
        x = stand_in((tokens, self.weight.shape[0]), self.weight)
        return backend_of("rms_norm", x, self.weight, eps=self.variance_epsilon)


def _backend_of_linear(linear: nn.Linear, activation: str | None, tokens: int) -> str:
    """The backend of a linear layer and its activation; torch's where they can't be one."""
    if activation is None:
        return "pytorch"
    x = stand_in((tokens, linear.in_features), linear.weight)
    return backend_of("linear_act", x, linear.weight, linear.bias, activation=activation)


FAMILIES: dict[str, dict[str, type[DropIn]]] = {
    "gpt2": {"GPT2MLP": _GPT2FeedForward},
    "bert": {
        "BertIntermediate": _LinearActivation,
        "BertSelfOutput": _AddNorm,
        "BertOutput": _AddNorm,
    },
    "roberta": {
        "RobertaIntermediate": _LinearActivation,
        "RobertaSelfOutput": _AddNorm,
        "RobertaOutput": _AddNorm,
    },
    "vit": {"ViTMLP": _FeedForward, "ViTIntermediate": _LinearActivation},
    "clip": {"CLIPMLP": _FeedForward},
    "siglip": {"SiglipMLP": _FeedForward},
    "llama": {"LlamaMLP": _GatedFeedForward, "LlamaRMSNorm": _RootMeanSquareNorm},
    "mistral": {"MistralMLP": _GatedFeedForward, "MistralRMSNorm": _RootMeanSquareNorm},
    "qwen2": {"Qwen2MLP": _GatedFeedForward, "Qwen2RMSNorm": _RootMeanSquareNorm},
    "qwen3": {"Qwen3MLP": _GatedFeedForward, "Qwen3RMSNorm": _RootMeanSquareNorm},
}
"""Model family -> class of it -> what does its work; a version may lack a class (ViT's differ)."""


def own_class(stock: type) -> type[Any] | None:
    """The drop-in for exactly this class of transformers, None if there is none."""
    home = stock.__module__.split(".")
    bases = FAMILIES.get(home[2], {}) if len(home) == 4 else {}
    name = stock.__name__
    if name not in bases or stock.__module__ != _home(home[2]):
        return None
    made = globals().get(name) or globals().setdefault(name, _drop_in(stock, bases[name]))
    return made if made.stock is stock else None


def stock_classes() -> list[type[nn.Module]]:
    """Every class that has a drop-in, in the installed version."""
    return [
        getattr(models, name)
        for family, bases in FAMILIES.items()
        for models in [importlib.import_module(_home(family))]
        for name in bases
        if hasattr(models, name)
    ]


def __getattr__(name: str) -> Any:
    """A drop-in by its name, as pickle asks for it: made at first use."""
    for family, bases in FAMILIES.items():
        if name in bases:
            return own_class(getattr(importlib.import_module(_home(family)), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _home(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _drop_in(stock: type, base: type[DropIn]) -> type[Any]:
    """The class that stands for ``stock``, under its name in this module, where pickle looks."""
    doc = f"Drop-in for transformers' ``{stock.__name__}``: {base.__doc__}"
    return type(stock.__name__, (base, stock), {"stock": stock, "__doc__": doc})
