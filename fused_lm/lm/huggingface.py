"""GPT-2 as transformers keeps it, to and from :class:`fused_lm.lm.GPT`; works without transformers.

    transformer.wte, wpe, ln_f              tokens, positions, norm
    transformer.h.N.ln_1, ln_2              blocks.N.norm1, norm2
    transformer.h.N.attn.c_attn, c_proj     blocks.N.qkv, out_proj        weights transposed
    transformer.h.N.mlp.c_fc, c_proj        blocks.N.ffn.up, down         weights transposed
    lm_head                                 head, or tokens if it is tied

GPT-2's matrices are [in, out] (its Conv1D), ours [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fused_lm.integrations.huggingface import ACTIVATION_NAMES

if TYPE_CHECKING:
    from fused_lm.lm.gpt import GPTConfig

EPS = 1e-5
USUAL_HEAD_DIM = 64
PREFIX = "transformer."
TOP = {"wte": "tokens", "wpe": "positions", "ln_f": "norm"}
BLOCK = {
    "ln_1": "norm1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
OLD_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
"""Causal masks that checkpoints of before 2023 have as buffers."""

OUR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu_squared": "relu2",
    "silu": "silu",
}
"""Our name of an activation -> the one of transformers' that GPT-2 is written with."""

UNCHANGED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Switches of a GPT2Config that change the model, and the values that ours can have."""

Model = TypeVar("Model", bound="HuggingFaceWeights")


class HuggingFaceWeights(nn.Module):
    """The two methods of :class:`fused_lm.lm.GPT` that exchange weights with transformers."""

    @classmethod
    def from_hf(cls: type[Model], source: Any, config: Any = None) -> Model:
        """A GPT with the weights of a GPT-2, copied, in their dtype and on their device.

        Args:
            source: A ``GPT2LMHeadModel`` or ``GPT2Model`` of transformers, or a state dict of one,
                with or without the prefix ``transformer.``.
            config: A :class:`GPTConfig`, a ``GPT2Config`` or the fields of its ``config.json``.
                Default: the model's own. A state dict alone tells all sizes but the heads', which
                are then taken to be 64 wide, as in every GPT-2 that OpenAI released; its
                activation is taken to be ``gelu_new``, its dropout 0.
        Returns:
            The model; in evaluation if ``source`` is a model that is.
        Raises:
            ValueError: One sentence: what GPT can't represent, or which weights don't fit.

        >>> model = GPT.from_hf(transformers.GPT2LMHeadModel.from_pretrained("gpt2"))
        """
        from fused_lm.lm.gpt import GPTConfig

        state = source.state_dict() if isinstance(source, nn.Module) else source
        if not isinstance(state, Mapping):
            got = type(source).__name__
            raise ValueError(f"from_hf takes a model of transformers or a state dict, got {got}")
        if config is None:
            config = getattr(source, "config", None)
        if config is None:
            config = config_of_state(state)
        elif not isinstance(config, GPTConfig):
            config = config_from_hf(config)
        weights = state_from_hf(state, config)
        make: Any = cls
        model = make(config, device="meta")
        model.load_state_dict(weights, assign=True)
        return model.train(source.training) if isinstance(source, nn.Module) else model

    def to_hf(self) -> dict[str, Tensor]:
        """The weights under GPT-2's names, for ``GPT2LMHeadModel(GPT2Config(**fields))
        .load_state_dict(weights)``; :func:`config_to_hf` gives the fields.

        Raises:
            ValueError: GPT-2 can't represent the model.
        """
        config: Any = self.config
        return state_to_hf(self.state_dict(), config)


def config_from_hf(config: Any) -> GPTConfig:
    """The :class:`GPTConfig` of a ``GPT2Config``, or of the fields of its ``config.json``.

    Raises:
        ValueError: It isn't GPT-2's, or GPT can't represent it.
    """
    from fused_lm.lm.gpt import GPTConfig

    fields = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = fields.get("model_type", "gpt2")
    if kind != "gpt2":
        raise ValueError(f"GPT takes the weights of a gpt2, not of a {kind}")
    for name, value in UNCHANGED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"GPT can't represent {name}={fields[name]}")
    eps = fields.get("layer_norm_epsilon", EPS)
    if eps != EPS:
        raise ValueError(f"GPT's norms have eps = {EPS}, not layer_norm_epsilon={eps}")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"GPT can't represent activation_function={activation!r}")
    dropouts = {name: fields.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(dropouts.values())) > 1:
        given = ", ".join(f"{name}={value}" for name, value in dropouts.items())
        raise ValueError(f"GPT has one dropout everywhere, not {given}")
    missing = [name for name in _SIZES.values() if name not in fields]
    if missing:
        raise ValueError(f"a GPT-2's configuration lacks {', '.join(missing)}")
    return GPTConfig(
        **{ours: fields[theirs] for ours, theirs in _SIZES.items()},
        ffn_dim=fields.get("n_inner"),
        activation=ACTIVATION_NAMES[activation],
        dropout=float(dropouts["embd_pdrop"]),
        tie_head=bool(fields.get("tie_word_embeddings", True)),
    )


_SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "num_layers": "n_layer",
    "embed_dim": "n_embd",
    "num_heads": "n_head",
}


def config_of_state(state: Mapping[str, Tensor]) -> GPTConfig:
    """What a GPT-2's state dict says of its model, with heads 64 wide.

    Raises:
        ValueError: It isn't one, or its width is no multiple of 64.
    """
    from fused_lm.lm.gpt import GPTConfig

    body, head = _split(state)
    try:
        V, C = body["wte.weight"].shape
        context, F = body["wpe.weight"].shape[0], body["h.0.mlp.c_fc.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"this state dict is no GPT-2's: {error.args[0]} is missing") from None
    if C % USUAL_HEAD_DIM:
        raise ValueError(
            f"heads of {USUAL_HEAD_DIM} don't divide a width of {C}: give the configuration"
        )
    return GPTConfig(
        vocab_size=V,
        context=context,
        num_layers=len({name.split(".")[1] for name in body if name.startswith("h.")}),
        embed_dim=C,
        num_heads=C // USUAL_HEAD_DIM,
        ffn_dim=F,
        activation="gelu_tanh",
        tie_head=head is None or torch.equal(head, body["wte.weight"]),
    )


def state_from_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Copies of a GPT-2's weights, under the names and in the shapes of ``GPT(config)``.

    Raises:
        ValueError: Weights are missing, unknown or of other sizes.
    """
    from fused_lm.lm.gpt import GPT

    _check_representable(config)
    body, head = _split(state)
    names = _names(config)
    missing, unknown = sorted(names.keys() - body), sorted(body.keys() - names)
    if missing or unknown:
        raise ValueError(
            f"this state dict is no GPT-2's of {config.num_layers} layers: "
            f"missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unknown) or 'nothing'}"
        )
    weights = {ours: _turned(theirs, body[theirs]).clone() for theirs, ours in names.items()}
    if config.tie_head:
        if head is not None and not torch.equal(head, body["wte.weight"]):
            raise ValueError("lm_head.weight isn't wte.weight, so the head isn't tied")
    elif head is None:
        raise ValueError("the head isn't tied, but there is no lm_head.weight")
    else:
        weights["head.weight"] = head.detach().clone()
    shapes = {name: t.shape for name, t in GPT(config, device="meta").state_dict().items()}
    for name, weight in weights.items():
        if weight.shape != shapes[name]:
            wanted, got = list(shapes[name]), list(weight.shape)
            raise ValueError(f"{name} must be {wanted} by the configuration, got {got}")
    return weights


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The fields of a ``GPT2Config`` for the model that ``GPT(config)`` is.

    Raises:
        ValueError: GPT-2 can't represent it.
    """
    _check_representable(config)
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "n_inner": config.ffn_dim,
        "activation_function": OUR_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": EPS,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_head,
    }


def state_to_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The weights of ``GPT(config)`` under the names and in the shapes of a GPT2LMHeadModel.

    Raises:
        ValueError: GPT-2 can't represent the model.
    """
    _check_representable(config)
    names = _names(config).items()
    weights = {PREFIX + theirs: _turned(theirs, state[ours]) for theirs, ours in names}
    weights["lm_head.weight"] = state["tokens.weight" if config.tie_head else "head.weight"]
    return weights


def _check_representable(config: GPTConfig) -> None:
    """ValueError where a GPT isn't a GPT-2."""
    wanted = {"norm": "layer_norm", "norm_first": True, "positions": "learned", "bias": True}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"a GPT-2 has {name}={value!r}, not {getattr(config, name)!r}")
    if config.num_kv_heads not in (None, config.num_heads):
        raise ValueError(
            f"a GPT-2 has as many heads of keys as of queries, not num_kv_heads="
            f"{config.num_kv_heads}"
        )
    if config.activation not in OUR_ACTIVATIONS:
        raise ValueError(f"a GPT-2 has no gated activation {config.activation!r}")


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """(weights without the prefix and without old buffers, the head or None)."""
    body = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
    head = body.pop("lm_head.weight", None)
    return {n: w for n, w in body.items() if not OLD_BUFFERS.fullmatch(n)}, head


def _names(config: GPTConfig) -> dict[str, str]:
    """GPT-2's name without the prefix -> ours, of every weight but the head's."""
    modules = dict(TOP)
    for n in range(config.num_layers):
        modules.update({f"h.{n}.{theirs}": f"blocks.{n}.{ours}" for theirs, ours in BLOCK.items()})
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in modules.items()
        for kind in (("weight",) if theirs in ("wte", "wpe") else ("weight", "bias"))
    }


def _turned(name: str, weight: Tensor) -> Tensor:
    """A weight of GPT-2's as the other side keeps it: a Conv1D's matrix transposed."""
    matrix = name.removesuffix(".weight").endswith(CONV1D) and name.endswith(".weight")
    return weight.detach().t().contiguous() if matrix else weight.detach()
